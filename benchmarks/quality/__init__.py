"""bench_quality: answers of compressed servers beside those of stock SGLang, on the same prompts."""
