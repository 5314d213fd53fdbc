"""The training kernel: interpreted, compared with fp64 autograd of the definitions; compiled to
machine code and launched without a GPU."""

import os

import pytest
import torch

pytest.importorskip("triton")

from dftserve.lm import Head
from dftserve.targets.sparse import sparsify
from dftserve.train import divergences as d
from dftserve.train import head, row_kernel, row_pass
from tests import interpreted
from tests.fake_gpu import compiled_kernels, fake_gpu

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled_only = pytest.mark.skipif(IS_INTERPRETED, reason="Triton interprets")
interpreted_only = pytest.mark.skipif(not IS_INTERPRETED, reason="another process interprets")
CPU = torch.device("cpu")
R, D = 5, 8
KINDS = [
    d.SFT(),
    d.ForwardKL(weight=0.7),
    d.ForwardKL(weight=0.0),
    d.ReverseKL(weight=0.7),
    d.SkewKL(weight=0.7, skew=0.2),
    d.JSD(weight=0.7, share=0.3),
]


@compiled_only
def test_this_file_passes_interpreted():
    assert " passed" in interpreted.run(__file__)


def target_of(vocabulary, *, is_sparse=False):
    """Labels among few tokens, so that they often coincide with draws and top entries."""
    generator = torch.Generator().manual_seed(1)
    logits_RV = 2 * torch.randn(R, vocabulary, generator=generator)
    if is_sparse:
        logits_RV[:, 9:] = -torch.inf
    labels_R = torch.randint(9, (R,), generator=generator)
    targets = sparsify(logits_RV.log_softmax(1), labels_R, k=4, draws=6, generator=generator)
    return d.TargetRows.of(labels_R.numpy(), targets)


def head_of(vocabulary, scale, cap):
    generator = torch.Generator().manual_seed(2)
    shapes = (R, D), (vocabulary, D), (vocabulary,)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return leaves, lambda hidden_RD, weight_VD, bias_V: (
        hidden_RD,
        Head(weight_VD, bias_V, scale, cap),
    )


@interpreted_only
@pytest.mark.parametrize("divergence", KINDS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize(
    ("scale", "cap", "vocabulary", "is_sparse"), [(2.0, 5.0, 41, False), (1.0, None, 5000, True)]
)
def test_loss_and_gradients_match_fp64(monkeypatch, divergence, scale, cap, vocabulary, is_sparse):
    """For hidden states, head and bias, over several chunks: within 1e-5 of the norm, plus the
    float32 error of numbers around 1 that cancel."""
    monkeypatch.setattr(row_pass, "has_kernel", lambda device: True)
    monkeypatch.setattr(d.LogitRows, "of", None)  # The plain-torch path calls it.
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 2 * vocabulary)
    target = target_of(vocabulary, is_sparse=is_sparse)
    leaves, make_head = head_of(vocabulary, scale, cap)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    hidden_RD, exact = make_head(*wide)
    logits_RV = exact.logits(hidden_RD)
    expected = divergence.reference(logits_RV, target).sum()
    expected_gradients = torch.autograd.grad(expected, wide, retain_graph=True)
    hidden_RD, ours = make_head(*leaves)
    result = head.head_loss(ours, hidden_RD, target, divergence)
    gradients = torch.autograd.grad(result.loss, leaves)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    for gradient, exact_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - exact_gradient).norm() <= 1e-5 * exact_gradient.norm() + 2e-6
    p_RV = logits_RV.softmax(dim=1)
    entropy = -torch.xlogy(p_RV, p_RV).sum().item()
    assert result.model_entropy.item() == pytest.approx(entropy, rel=1e-5)


@interpreted_only
def test_the_self_check_passes():
    assert row_pass.self_check(CPU)


@interpreted_only
@pytest.mark.parametrize("name", ["POINTS", "REVERSE_KL", "SKEW_KL", "JENSEN_SHANNON"])
def test_the_self_check_detects_another_divergence(monkeypatch, name):
    other = (getattr(row_kernel, name) + 1) % 4
    monkeypatch.setattr(row_kernel, name, other)
    of_float32 = [case for case in row_pass.cases() if case.dtype is torch.float32]
    monkeypatch.setattr(row_pass, "cases", lambda: of_float32)
    assert not row_pass.self_check(CPU)


@compiled_only
def test_the_self_check_covers_all_that_the_kernel_supports():
    """Each divergence in every type, scaled or not, capped or not."""
    tried = list(row_pass.cases())
    for kind in {type(case.divergence) for case in tried}:
        of_kind = [case for case in tried if type(case.divergence) is kind]
        assert {case.dtype for case in of_kind} == set(row_pass.KERNEL_DTYPES)
        assert {case.scale == 1.0 for case in of_kind} == {True, False}
        assert {case.cap is None for case in of_kind} == {True, False}


FAULTS = {
    "the scale is not looked at": lambda raw_RV, options: (raw_RV, options | {"scale": 1.0}),
    "the cap is not looked at": lambda raw_RV, options: (raw_RV, options | {"cap": None}),
    "float16 is rounded further": lambda raw_RV, options: (
        raw_RV.to(torch.float8_e5m2).to(raw_RV.dtype) if raw_RV.dtype is torch.float16 else raw_RV,
        options,
    ),
    "-inf is a number": lambda raw_RV, options: (raw_RV.clamp(min=-1), options),
}


@compiled_only
@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_check_detects_a_fault(monkeypatch, fault):
    """Plain torch replaces the kernel, with the fault and then without it."""

    def plain(divergence, target, scale, cap):
        def row_pass_of_part(raw_RV, part):
            raw_RV, options = FAULTS[fault](raw_RV, {"scale": scale, "cap": cap})
            loss_R, entropy_R, gradient_RV = row_pass.PlainPass(divergence, target, **options)(
                raw_RV, part
            )
            return loss_R, entropy_R, gradient_RV.to(raw_RV.dtype)

        return row_pass_of_part

    monkeypatch.setattr(row_pass, "_fused", plain)
    assert not row_pass.self_check(CPU)
    monkeypatch.setitem(FAULTS, fault, lambda raw_RV, options: (raw_RV, options))
    assert row_pass.self_check(CPU)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@compiled_only
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_divergence_is_compiled_once_and_launched_again(capability, cache):
    """For any part of a batch. Logits are loaded sixteen bytes at a time."""
    kernels = {"_row_pass": row_kernel._row_pass}
    target = target_of(64).to(torch.float32)
    with fake_gpu(capability, cache, kernels) as gpu:
        cases = [(each, torch.bfloat16, None) for each in KINDS]
        cases += [(KINDS[-1], torch.float32, None), (KINDS[1], torch.bfloat16, 5.0)]
        for divergence, dtype, cap in cases:
            fused = row_pass._fused(divergence, target, 1.0, cap)
            for part in (slice(0, 3), slice(3, 5)):
                fused(torch.zeros(part.stop - part.start, 64, dtype=dtype), part)
        assert gpu.launched() == {"_row_pass": 2 * len(cases)}
        # SFT is forward KL without a target.
        assert gpu.loaded == {"_row_pass": len(cases) - 1}
        for compiled in compiled_kernels(kernels):
            assert "ld.global.v4" in compiled.asm["ptx"]
            assert "st.global.v4" in compiled.asm["ptx"]


@compiled_only
def test_the_kernel_is_launched_on_the_device_of_the_logits(cache):
    """A training process checks its model before it makes its GPU the current device."""
    kernels = {"_row_pass": row_kernel._row_pass}
    target = target_of(64).to(torch.float32)
    with fake_gpu(90, cache, kernels) as gpu:
        fused = row_pass._fused(KINDS[0], target, 1.0, None)
        with gpu.tensors_on(1):
            fused(torch.zeros(3, 64), slice(0, 3))
        assert gpu.devices == [1]
        assert gpu.current == 0


@compiled_only
def test_a_kernel_that_fails_or_disagrees_is_logged_and_not_used(monkeypatch, caplog):
    """For a CUDA device; a CPU never uses the kernel."""

    def fails(device):
        raise RuntimeError("no compiler")

    for check, message in ((fails, "fails"), (lambda device: False, "disagrees")):
        monkeypatch.setattr(row_pass, "self_check", check)
        row_pass.has_kernel.cache_clear()
        assert not row_pass.has_kernel(torch.device("cuda"))
        assert message in caplog.text
    row_pass.has_kernel.cache_clear()
    assert not row_pass.has_kernel(CPU)
