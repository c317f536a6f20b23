"""What the forward holds and does: head pages, host rows, compression at the end of prefill, retrieval, decode."""
