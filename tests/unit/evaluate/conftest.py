import pytest
import torch
from support.tiny import tiny


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    """Tiny random models in float64 and train mode, one with rotary and one with learned positions."""
    torch.manual_seed(0)
    model = tiny(request.param, layers=2).double()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))  # far from the flat start
    return model.train()
