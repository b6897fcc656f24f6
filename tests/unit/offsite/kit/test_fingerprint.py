import copy
import hashlib
import json
import struct

import pytest
import torch
from support.tiny import tiny

from siftune.base.errors import KitError
from siftune.offsite.kit import manifest as fingerprint_module
from siftune.offsite.kit.manifest import fingerprint


def test_fingerprints_are_of_names_shapes_and_float32_values(monkeypatch):
    model = tiny("llama", 2, tie_word_embeddings=True)
    digest = hashlib.sha256()
    for name in sorted(model.state_dict()):
        if name != "lm_head.weight":  # tied
            tensor = model.state_dict()[name]
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            digest.update(struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist()))
    assert fingerprint(model) == digest.hexdigest()
    monkeypatch.setattr(fingerprint_module, "_CHUNK", 7)
    assert fingerprint(model) == digest.hexdigest()


def test_fingerprints_do_not_depend_on_how_a_checkpoint_is_loaded():
    from accelerate import cpu_offload

    half = tiny("gpt2", 2).bfloat16()
    wide = copy.deepcopy(half).float()
    assert fingerprint(wide) == fingerprint(half)
    offloaded = cpu_offload(copy.deepcopy(half), execution_device=torch.device("cpu"))
    assert fingerprint(offloaded) == fingerprint(half)
    with torch.no_grad():
        wide.transformer.h[1].ln_1.weight[3] += 2e-7
    assert fingerprint(wide) != fingerprint(half)
    assert fingerprint(tiny("gpt2", 3)) != fingerprint(tiny("gpt2", 2))


def test_weights_without_values_have_no_fingerprint():
    with pytest.raises(KitError, match="has no values"):
        fingerprint(tiny("llama", 2).to("meta"))
