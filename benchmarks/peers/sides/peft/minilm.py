"""(f) by PEFT: its LoRA and DoRA layers, and the hand-written step of BiDoRA on the latter."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model

from benchmarks.peers.side import Method, Side
from benchmarks.peers.sides.hand.minilm import side
from benchmarks.peers.workloads.minilm import ALPHA, RANK, TARGETS, Texts, in_peft


def build(texts: Texts, method: Method) -> Side:
    dora = not method.kind.endswith("LoRA")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), use_dora=dora)
    model = get_peft_model(texts.base(), config).eval()
    found = side(texts, method, model, in_peft(model, texts))
    if dora:
        found.note = "PEFT's DoRA takes the norm for a constant" + (
            "; the step of BiDoRA is the hand-written one on its layers" if "step" in method.kind else ""
        )
    return found
