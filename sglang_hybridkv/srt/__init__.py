"""Adapters to SGLang; file names mirror SGLang's. Only this package and the patches import sglang."""
