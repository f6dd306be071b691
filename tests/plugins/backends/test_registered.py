"""Every kernel backend that can run here, ours and those of other installed distributions."""

import pytest
import torch

import qcore
from qcore import MatmulSpec, QuantConfig
from qcore.plugins import installed
from qcore.testing import check_backend, random_weight

BACKENDS = installed().usable("backend")
USABLE = [name for name, backend in BACKENDS.items() if backend.unavailable() is None]


@pytest.mark.parametrize("name", USABLE)
def test_conforms(name):
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    served = 0
    for device in devices:
        spec = MatmulSpec(QuantConfig(bits=4, group_size=32), 128, 64, False, torch.float16, torch.device(device))
        if BACKENDS[name].why_not(spec) is None:
            served += check_backend(BACKENDS[name], device, dtypes)
    assert served, f"{name} says it can run here and serves no ordinary layer"


def test_the_one_that_can_not_run_here_says_why():
    for name, backend in BACKENDS.items():
        assert name in USABLE or len(backend.unavailable()) > 10


def test_the_reference_serves_every_layer_there_is():
    reference = BACKENDS["torch_reference"]
    for bits in range(2, 9):
        for group_size in (-1, 1, 7, 1000):
            config = QuantConfig(bits=bits, group_size=group_size, sym=False)
            spec = MatmulSpec(config, 19, 5, group_size == 7, torch.float64, torch.device("cpu"))
            assert reference.why_not(spec) is None
            weight = random_weight(5, 19, config, spec.act_order)
            x = torch.eye(19, dtype=torch.float64)
            found = reference.matmul(x, reference.prepare(weight, spec), spec)
            assert torch.equal(found.t(), weight.dequantize(torch.float64))


def test_the_reference_takes_floating_zeros():
    reference = BACKENDS["torch_reference"]
    config = QuantConfig(bits=4, group_size=16, sym=False)
    plain = random_weight(8, 32, config)
    weight = qcore.QuantizedWeight(plain.codes, plain.scales, plain.zeros.float() + 0.25, plain.g_idx, config)
    spec = MatmulSpec(config, 32, 8, False, torch.float32, torch.device("cpu"))
    x = torch.randn(3, 32)
    found = reference.matmul(x, reference.prepare(weight, spec), spec)
    assert torch.allclose(
        found, x @ weight.dequantize().t(), atol=1e-6
    )  # the same product, maybe summed in another order


def test_prepare_keeps_nothing_of_the_codes_it_was_given():
    reference = BACKENDS["torch_reference"]
    config = QuantConfig(bits=4, group_size=16)
    weight = random_weight(8, 32, config)
    spec = MatmulSpec(config, 32, 8, False, torch.float32, torch.device("cpu"))
    buffers = reference.prepare(weight, spec)
    assert buffers["words"].numel() * 4 == 8 * 32 / 2
    before = reference.matmul(torch.eye(32), buffers, spec)
    weight.codes.zero_()
    assert torch.equal(reference.matmul(torch.eye(32), buffers, spec), before)


def test_the_reference_op_passes_torchs_own_checks():
    reference = BACKENDS["torch_reference"]
    weight = random_weight(8, 32, QuantConfig(bits=4, group_size=16))
    spec = MatmulSpec(weight.config, 32, 8, False, torch.float32, torch.device("cpu"))
    b = reference.prepare(weight, spec)
    x = torch.randn(3, 32, requires_grad=True)
    torch.library.opcheck(torch.ops.qcore.reference_matmul, (x, b["words"], b["scales"], b["zeros"], b["g_idx"], 4, 16))
