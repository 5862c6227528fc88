import pytest
import torch
from harmony_fast.kernels import dispatch

X = torch.zeros(1)
GPU = torch.device("cuda", 0)


class OnGpu:
    """What the dispatcher looks at in a CUDA tensor, for machines without a GPU."""

    is_cuda, device = True, GPU

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wishes, no interpreter."""
    monkeypatch.delenv("HARMONY_FAST_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_preferred", {})


@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_cpu_takes_torch_and_says_why(operation: str) -> None:
    assert dispatch.choose(operation, X) == ("torch", "the tensors are on the CPU")


@pytest.mark.parametrize(
    ("capability", "dtype", "backend", "reason"),
    [
        ((9, 0), torch.bfloat16, "triton", "CUDA tensors"),
        ((8, 0), torch.float16, "triton", "CUDA tensors"),
        ((7, 5), torch.float16, "torch", "capability 7.5"),
        ((8, 9), torch.float64, "torch", "not float64"),
    ],
)
def test_gpu_takes_triton_where_it_can(
    capability: tuple, dtype: torch.dtype, backend: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    choice = dispatch.choose("attention", OnGpu(dtype))
    assert choice.backend == backend and reason in choice.reason


def test_interpreter_takes_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("ema", X) == ("triton", "TRITON_INTERPRET is set")
    assert dispatch.choose("ema", X.double()).backend == "torch"
    assert dispatch.choose("ema", X, {"triton": "it is too odd"}) == ("torch", "it is too odd")


def test_wishes_are_kept_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.prefer({"attention": "triton", "ema": "torch", "contrastive": "auto"})
    assert dispatch.choose("ema", X) == ("torch", "kernels.ema asks for it")
    with pytest.raises(
        ValueError, match=r"attention: kernels\.attention asks for triton, but the tensors are on the CPU"
    ):
        dispatch.choose("attention", X)
    monkeypatch.setenv("HARMONY_FAST_KERNELS", "torch")
    assert dispatch.choose("attention", X) == ("torch", "HARMONY_FAST_KERNELS asks for it")
    monkeypatch.setenv("HARMONY_FAST_KERNELS", "xformers")
    with pytest.raises(ValueError, match="HARMONY_FAST_KERNELS asks for xformers, but xformers"):
        dispatch.choose("attention", X)
    assert dispatch.choose("ema", X).reason == "kernels.ema asks for it"
    monkeypatch.setenv("HARMONY_FAST_KERNELS", "auto")
    assert dispatch.choose("ema", X).reason == dispatch.choose("attention", X).reason == "the tensors are on the CPU"
    monkeypatch.setenv("HARMONY_FAST_KERNELS", "cuda")
    with pytest.raises(ValueError, match="'cuda' is none of auto, triton, torch, xformers"):
        dispatch.choose("ema", X)


def test_tensors_without_contents_stand_for_those_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine's, where it has one; xformers keeps what triton keeps."""
    x = torch.empty(1, device="meta")
    assert dispatch.choose("attention", x).backend == "triton"
    with dispatch.preferring({"attention": "xformers", "ema": "torch"}):
        assert dispatch.choose("attention", x).backend == "triton" and dispatch.choose("ema", x).backend == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (7, 5))
    assert dispatch.choose("attention", x).backend == "torch"


def test_unknown_wishes_are_named() -> None:
    with pytest.raises(ValueError, match="unknown operation 'atention'; known: attention"):
        dispatch.prefer({"atention": "torch"})
    with pytest.raises(ValueError, match=r"kernels\.ema: 'xformers' is none of auto, triton, torch"):
        dispatch.prefer({"ema": "xformers"})
