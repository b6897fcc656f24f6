"""Bytes that each rank passes to collectives in a step, by method, beside plain LoRA.

    torchrun --standalone --nproc_per_node 2 -m lab.communication

A random llama with the hidden sizes of SmolLM2-135M and few layers trains by LoRA of rank 32 in all layers, on short
rows, since the traffic does not depend on them. torch's profiler records every call of gloo, including those of DDP's
reducer and of FSDP2. Figures are means over the steps after the first, in which IST scores once every ten steps.
"""

import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from siftune.engine.ranks import join_launch, leave_launch, let_go, rank, world_size
from siftune.engine.sharding import shard_base
from siftune.methods.options import GASTSettings
from siftune.models.adapters.attach import attach_adapter
from siftune.recipe.schema import Recipe
from siftune.train.build import methods_of
from siftune.train.trainer import SiftTrainer

STEPS = 10
LAYERS = 4
BYTES = {"float": 4, "double": 8, "long int": 8, "int": 4, "unsigned char": 1, "c10::BFloat16": 2}

RECIPES = {
    "dense": Recipe(),
    "rst": Recipe(method="rst"),
    "ist": Recipe(method="ist"),
    "gast, rest": Recipe(method="gast", gast=GASTSettings(support="rest")),
    "gast, sample": Recipe(method="gast", gast=GASTSettings(support="sample")),
    "gast, sample, averaged": Recipe(method="gast", gast=GASTSettings(support_every=4)),
}


def small_model() -> torch.nn.Module:
    """A llama whose layers are SmolLM2's, with its adapter; the same on every rank."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return attach_adapter(LlamaForCausalLM(config), rank=32)


def rows() -> Dataset:
    """Random short rows."""
    ids = torch.randint(3, 1000, (64, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 8] * 64})


class AfterFirst(TrainerCallback):
    """Records collectives from the end of the first step on: DDP broadcasts once, and sorts its buckets."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin after the first step, and end with the last."""
        if state.global_step == 1:
            self.profile.start()
        if state.global_step == args.max_steps:
            self.profile.stop()


def sent(found: profile) -> Counter[str]:
    """Bytes that this rank passed to each kind of collective."""
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        found.export_chrome_trace(f"{folder}/trace.json")
        for event in json.loads(Path(folder, "trace.json").read_text())["traceEvents"]:
            kind, _, name = str(event.get("name", "")).partition(":")
            if kind == "gloo":
                total[name] += sum(sizes(event["args"]))
    return total


def sizes(call: dict[str, Any]) -> Iterator[int]:
    """Bytes of each input tensor of a call."""
    for shape, kind in zip(call["Input Dims"], call["Input type"], strict=True):
        if kind in BYTES:
            yield math.prod(shape) * BYTES[kind]


def measure(recipe: Recipe, shard: bool, folder: str) -> Counter[str]:
    """Train some steps, and count."""
    model, watch = small_model(), AfterFirst()
    if shard:
        shard_base(model)
    settings = TrainingArguments(
        folder, max_steps=STEPS + 1, per_device_train_batch_size=4, save_strategy="no", report_to="none", use_cpu=True,
        logging_strategy="no", disable_tqdm=True, ddp_find_unused_parameters=False, remove_unused_columns=False,
    )  # fmt: skip
    trainer = SiftTrainer(model, settings, train_dataset=rows(), callbacks=[*methods_of(recipe, None), watch])
    trainer.train()
    let_go(trainer)
    return sent(watch.profile)


def main() -> None:
    """Measure every method, and print a Markdown table."""
    if not join_launch():
        sys.exit("start it in several processes: torchrun --standalone --nproc_per_node 2 -m lab.communication")
    lines, plain = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            cells = []
            for shard in (False, True):
                found = measure(recipe, shard, folder)
                reduced = sum(n for kind, n in found.items() if "reduce" in kind) / STEPS / 1e6
                others = sum(found.values()) / STEPS / 1e6 - reduced
                plain = plain or reduced
                cells += [f"{reduced:.3f}", f"{reduced / plain:.3f}", f"{others:.3f}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    trained = sum(p.numel() for p in small_model().parameters() if p.requires_grad)
    if not rank():
        print(f"{world_size()} ranks, {LAYERS} layers, {trained:,} parameters train; MB a step and rank")
        print("| method | DDP: reduced | to dense | others | sharded base: reduced | to dense | gathered, others |")
        print("|---|---|---|---|---|---|---|")
        print("\n".join(lines))
    leave_launch()


if __name__ == "__main__":
    main()
