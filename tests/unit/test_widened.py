"""Products of bf16 that are widened, against double precision and torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from falcon_dist.engine import widened

ROUNDED = 0.003
"""Relative error of a product that is summed in fp32 and rounded to bf16 once."""


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.dtype == torch.bfloat16
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())


def layouts(rows: int, inner: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """As forward, the gradient of an input and that of a weight have them, and parts of larger matrices."""
    return [
        (bf16(rows, inner), bf16(columns, inner).t()),
        (bf16(rows, inner), bf16(inner, columns)),
        (bf16(inner, rows).t(), bf16(inner, columns)),
        (bf16(rows, inner + 3)[:, 3:], bf16(inner, columns + 5)[:, :columns]),
    ]


@pytest.mark.parametrize("piece", [widened.PIECE, 1])
@pytest.mark.parametrize("sizes", [(40, 64, 300), (300, 64, 40), (130, 70, 130), (40, 300, 64)])
def test_a_product_is_summed_in_fp32_and_rounded_once(
    sizes: tuple[int, int, int], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(widened, "PIECE", piece)
    for left, right in layouts(*sizes):
        found = widened.mm(left, right)
        assert found.is_contiguous()
        assert error(found, left.double() @ right.double()) < ROUNDED
        many = widened.bmm(torch.stack([left, -left]), torch.stack([right, right]))
        assert error(many, torch.stack([left.double() @ right.double(), -left.double() @ right.double()])) < ROUNDED


@pytest.mark.parametrize("piece", [64 * 64, 2 * 200 * 300])
@pytest.mark.parametrize("inner", [64, 300])
@pytest.mark.parametrize("factors", [(1, 1), (0.5, -2), (0, 1)])
def test_what_is_added_is_broadcast_and_weighted(
    factors: tuple[float, float], inner: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(widened, "PIECE", piece)
    beta, alpha = factors
    left, right = bf16(200, inner), bf16(inner, 90)
    product = alpha * (left.double() @ right.double())
    for added in (bf16(90), bf16(200, 1), bf16(200, 90), bf16()):
        wanted = beta * added.double() + product
        assert error(widened.addmm(added, left, right, beta=beta, alpha=alpha), wanted) < ROUNDED
        found = widened.baddbmm(added, left.expand(3, -1, -1), right.expand(3, -1, -1), beta=beta, alpha=alpha)
        assert error(found, wanted.expand(3, -1, -1)) < ROUNDED


def test_nothing_is_added_where_its_factor_is_zero() -> None:
    left, right = bf16(64, 64), bf16(64, 64)
    nothing = torch.full((64,), torch.nan).bfloat16()
    assert bool(widened.addmm(nothing, left, right, beta=0).isfinite().all())
    assert bool(widened.baddbmm(nothing, left[None], right[None], beta=0).isfinite().all())


@pytest.mark.parametrize(
    "pair",
    [
        (torch.randn(64, 64), torch.randn(64, 64)),
        (torch.randn(64, 64).double(), torch.randn(64, 64).double()),
        (torch.randint(9, (64, 64)), torch.randint(9, (64, 64))),
        (bf16(1, 64), bf16(64, 640)),
        (bf16(0, 64), bf16(64, 64)),
        (bf16(64, 0), bf16(0, 64)),
        (bf16(0, 0), bf16(0, 0)),
        (bf16(64, 2), bf16(2, 640)),
    ],
    ids=["fp32", "fp64", "int64", "one row", "no rows", "no inner", "nothing", "rank 2"],
)
def test_all_else_is_torchs_own(pair: tuple[Tensor, Tensor]) -> None:
    left, right = pair
    added = torch.ones(right.shape[1], dtype=left.dtype)
    assert torch.equal(widened.mm(left, right), torch.mm(left, right))
    assert torch.equal(widened.addmm(added, left, right), torch.addmm(added, left, right))
    assert torch.equal(widened.bmm(left[None], right[None]), torch.bmm(left[None], right[None]))
    assert torch.equal(widened.baddbmm(added, left[None], right[None]), torch.baddbmm(added, left[None], right[None]))


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_adapters_of_few_columns_are_widened_too(rank: int) -> None:
    x, into, out, grad = bf16(512, 576), bf16(rank, 576), bf16(576, rank), bf16(512, 576)
    low = bf16(512, rank)
    for pair in ((x, into.t()), (low, out.t()), (grad, out), (low, into), (grad.t(), low), (low.t(), x)):
        assert widened._pays(*pair, 2)


@pytest.mark.parametrize(
    "pair",
    [
        (bf16(64, 64), bf16(65, 64)),
        (bf16(64, 192), bf16(193, 64)),
        (bf16(64, 64), torch.randn(64, 64)),
        (bf16(64), bf16(64)),
    ],
)
def test_what_torch_refuses_is_refused(pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "PIECE", 1)
    with pytest.raises((RuntimeError, IndexError)):
        widened.mm(*pair)
    with pytest.raises((RuntimeError, IndexError)):
        widened.addmm(bf16(64), *pair)
    with pytest.raises((RuntimeError, IndexError)):
        widened.bmm(*(x[None] for x in pair))
    with pytest.raises((RuntimeError, IndexError)):
        widened.baddbmm(bf16(64), *(x[None] for x in pair))


def test_batches_of_different_lengths_are_refused() -> None:
    with pytest.raises(RuntimeError):
        widened.bmm(bf16(2, 64, 64), bf16(3, 64, 64))
    with pytest.raises(RuntimeError):
        widened.baddbmm(bf16(64), bf16(3, 64, 64), bf16(2, 64, 64))


def test_memory_taken_in_inference_mode_serves_outside_of_it() -> None:
    vars(widened._kept).clear()
    left, right = bf16(64, 64), bf16(64, 64)
    with torch.inference_mode():
        first = widened.mm(left, right)
    assert torch.equal(widened.mm(left, right), first)
    assert torch.equal(widened.bmm(left[None], right[None])[0], first)


def test_memory_is_of_fp32_whatever_tensors_are_made_of_elsewhere() -> None:
    vars(widened._kept).clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        widened.mm(bf16(64, 64), bf16(64, 64))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in vars(widened._kept).values()} == {torch.float32}


def held_bytes() -> int:
    return sum(tensor.nbytes for tensor in vars(widened._kept).values())


@pytest.mark.parametrize(
    ("rows", "outer", "inner"), [(100, 4000, 640), (700, 9000, 640), (300, 640, 640), (300, 640, 9000)]
)
def test_what_is_kept_is_told_beforehand(rows: int, outer: int, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "PIECE", 64 * 640)
    monkeypatch.setattr(widened, "multiplies_bf16", lambda: True)
    assert widened.kept_bytes(rows, [(outer, inner)]) == 0
    monkeypatch.setattr(widened, "multiplies_bf16", lambda: False)
    vars(widened._kept).clear()
    x, weight, grad = bf16(rows, inner), bf16(outer, inner), bf16(rows, outer)
    for left, right in ((x, weight.t()), (grad, weight), (grad.t(), x)):
        widened.mm(left, right)
    assert 0.7 < held_bytes() / widened.kept_bytes(rows, [(inner, inner), (outer, inner)]) < 1.1


def test_the_gradient_of_an_output_layers_input_widens_no_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "PIECE", 64 * 640)
    vars(widened._kept).clear()
    widened.mm(bf16(128, 9000), bf16(9000, 64))
    assert held_bytes() < 4 * 9000 * 64


@pytest.mark.parametrize("sizes", [(40, 64, 64, 64), (5, 300, 64, 300)])
def test_a_batch_keeps_a_piece_in_each_place(sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are more than a piece each are cut one by one, as those of layers are."""
    torch.manual_seed(0)
    monkeypatch.setattr(widened, "PIECE", 64 * 640)
    batch, rows, inner, columns = sizes
    left, right, added = bf16(batch, rows, inner), bf16(batch, inner, columns), bf16(batch, rows, columns)
    vars(widened._kept).clear()
    product = left.double() @ right.double()
    assert error(widened.bmm(left, right), product) < ROUNDED
    assert error(widened.baddbmm(added, left, right), added.double() + product) < ROUNDED
    assert held_bytes() <= 3 * 4 * widened.PIECE


INSTALLED = """
import torch
from falcon_dist.engine import widened
widened.multiplies_bf16 = lambda: {multiplies}
assert (widened.install() is None) == {multiplies}
assert widened.install() is widened.install()
seen = []
widened._pays = lambda *asked, pays=widened._pays: seen.append(asked) or pays(*asked)
layer = torch.nn.Linear(96, 128, dtype=torch.bfloat16)
x = torch.randn(64, 96).bfloat16().requires_grad_()
layer(x).square().sum().backward()
with torch.autocast("cpu", torch.bfloat16):
    torch.nn.Linear(96, 128, bias=False)(torch.randn(64, 96))
torch.nn.functional.scaled_dot_product_attention(*(torch.randn(2, 4, 32, 64).bfloat16() for _ in "qkv"))
wanted = (x.float() @ layer.weight.float().t() + layer.bias.float()).bfloat16()
torch.testing.assert_close(layer(x), wanted, rtol=0.02, atol=0.02)
print(len(seen), x.grad.isfinite().all().item(), layer.weight.grad.shape == layer.weight.shape)
"""


@pytest.mark.parametrize("multiplies", [False, True])
def test_installed_it_serves_layers_gradients_and_autocast(multiplies: bool) -> None:
    program = [sys.executable, "-c", INSTALLED.format(multiplies=multiplies)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    seen, *right = done.stdout.split()
    assert right == ["True", "True"]
    assert int(seen) == 0 if multiplies else int(seen) >= 6
