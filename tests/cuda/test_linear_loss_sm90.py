"""The fused kernels of linear_masked_cross_entropy: tile edges, range, accumulation, what is left out, launches."""

import pytest
import torch

import illada
from illada.ops import linear_loss, raw, reference
from illada.ops.variants import use_variants
from illada.testing import assert_close_like, relative_error

BF16 = torch.bfloat16
CASES = [  # N, C, V, spread of the logits, chunk_rows: what the row is for
    (127, 64, 1000, 1.0, 0),  # one row less than a tile
    (128, 72, 1000, 0.02, 0),  # flat, as at initialisation
    (129, 136, 1001, 30.0, 0),  # peaked: most of a row's bits are in a few probabilities
    (300, 264, 4096, 3.0, 0),  # more columns than a tile
    (257, 8, 257, 1.0, 0),  # one more than tiles in all directions
    (600, 64, 700, 1.0, 256),  # three chunks
    (140, 64, 777, 300.0, 0),  # targets further below the largest logit than the first reference allows
    (3, 4096, 300, 1.0, 0),  # iLLaDA's width
    (2, 64, 155136, 1.0, 0),  # iLLaDA's vocabulary
]


@pytest.fixture(autouse=True)
def fused(device, request):
    """Skip on other GPUs. On these, nothing may use the portable path, even if kernels were not built."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the fused kernels need compute capability 9.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss.kernels, "forward_by_chunks", None)
        yield


def make(case, device, generator, dtype=BF16):
    """Return strided hidden and weight with NaNs around rows, targets, weights. The first and last token have one."""
    count, width, vocab, spread, _ = case

    def strided(rows, scale, dtype):
        wide = torch.full((rows + 2, width + 16), torch.nan, dtype=dtype)
        wide[1:-1, 8 : width + 8] = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
        return wide.to(device)[1:-1, 8 : width + 8]

    targets = torch.randint(vocab, (count,), generator=generator)
    targets[0], targets[-1] = 0, vocab - 1
    weights = 10 ** (3 * torch.rand(count, generator=generator))  # 1 / t down to t = 1e-3
    return strided(count, spread / width**0.5, dtype), strided(vocab, 1.0, BF16), targets.to(device), weights.to(device)


def results(function, hidden, weight, *args, **keywords):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss, nll = function(*leaves, *args, return_nll=True, **keywords)
    return tuple(x.detach().cpu() for x in (loss, nll, *torch.autograd.grad(loss, leaves)))


def plain(hidden, weight, *args, **keywords):
    return reference.masked_cross_entropy((hidden @ weight.T).float(), *args, **keywords)


def expected(hidden, weight, targets, weights, **keywords):
    """Return (float64, plain torch in bfloat16) on the host."""
    host = [x.cpu() for x in (hidden, weight, targets, weights)]
    want = results(reference.linear_masked_cross_entropy, host[0].double(), host[1].double(), *host[2:], **keywords)
    return want, results(plain, host[0], host[1], *host[2:], **keywords)


@pytest.mark.parametrize("case", CASES)
def test_fused_matches_fp64(case, device, generator):
    inputs = make(case, device, generator)
    got = results(illada.linear_masked_cross_entropy, *inputs, normalizer=12.5, chunk_rows=case[-1] or None)
    for name, g, w, b in zip(("loss", "nll", "dX", "dW"), got, *expected(*inputs, normalizer=12.5), strict=True):
        try:
            assert_close_like(g, w, b)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    assert got[1].min() >= 0


# ------------------------------------------------------------------------------------------- rows the model is sure of

SURE = [  # C, V, the targets' logits from .. to: what the row is for
    (64, 500, 18, 30),  # p is 1 - 0.1 .. 1 - 1e-8
    (4096, 500, 8, 24),  # iLLaDA's width: 256 sums that the tensor cores round toward zero
    (4096, 257, 40, 60),  # 1 - p is 1e-24: fp32 and fp64 have nothing of it beside p
]


def make_sure(case, rows, generator):
    """Return hidden, weight, targets: the target's logit goes over the range, the others are noise."""
    width, vocab, low, high = case
    weight = torch.nn.functional.normalize(torch.randn(vocab, width, generator=generator)).to(BF16)
    targets = torch.randint(vocab, (rows,), generator=generator)
    hidden = (weight[targets].float() * torch.linspace(low, high, rows)[:, None]).to(BF16)
    return hidden, weight, targets


def exact_sure(hidden, weight, targets):
    """Return nll, 1 - p and hidden's gradient in float64, without a difference of nearly equal numbers."""
    logits, row = hidden.double() @ weight.double().T, torch.arange(len(targets))
    terms = (logits - logits[row, targets, None]).exp()
    terms[row, targets] = 0
    others = terms.sum(1)
    rest = others / (1 + others)
    terms /= (1 + others)[:, None]
    terms[row, targets] = -rest
    return others.log1p(), rest, terms @ weight.double()


def error_of_logits(hidden, weight, targets):
    """The most that sums rounded toward zero after each 16 products may be off, for each row: the largest one there is,
    times fp32's 2^-23, at each of the steps; its logit and that of another id may be that far apart."""
    return 2.0**-23 * (hidden.double() * weight[targets].double()).sum(1) * hidden.shape[1] / 16 + 1e-5


@pytest.mark.parametrize("case", SURE)
def test_sure_rows_keep_their_gradient(case, device, generator):
    # In bfloat16 the target's probability would be 1, and the gradient gone; in fp32 it would be noise.
    hidden, weight, targets = make_sure(case, 40, generator)
    inputs = [x.to(device) for x in (hidden, weight, targets, torch.ones(40))]
    nll, d_hidden = results(illada.linear_masked_cross_entropy, *inputs)[1:3]
    with torch.no_grad():
        assert torch.equal(illada.linear_masked_cross_entropy(*inputs, return_nll=True)[1].cpu(), nll)
    want, _, gradient = exact_sure(hidden, weight, targets)
    assert 0 < want.min() < 1e-6 and want.max() < 0.2
    limit = error_of_logits(hidden, weight, targets)
    assert ((nll - want).abs() <= limit * want).all()
    # The other probabilities, p - 1 and the result are rounded to bfloat16, 2^-9 of each.
    assert ((d_hidden.double() - gradient).norm(dim=1) <= (limit + 2**-7) * gradient.norm(dim=1)).all()
    assert ((d_hidden.double() * weight[targets].double()).sum(1) < 0).all()  # a step down makes the target likelier


def wgmma_logits(hidden, weight):
    """Return hidden @ weight^T as the tensor cores of an H100 sum it: 16 products and the sum so far are each cut off
    25 bits below the largest exponent; their sum is rounded to fp32 toward zero. [MMA-Sim, arXiv 2512.07004]"""
    x, w = hidden.double(), weight.double()
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    for k in range(0, x.shape[1], 16):
        terms = torch.cat([x[:, None, k : k + 16] * w[None, :, k : k + 16], total[..., None]], -1)
        exponents = torch.frexp(x[:, k : k + 16])[1][:, None] + torch.frexp(w[:, k : k + 16])[1][None] - 2
        exponents = torch.cat([exponents, torch.frexp(total)[1][..., None] - 1], -1)
        largest = exponents.masked_fill(terms == 0, -200).amax(-1, keepdim=True)
        cut = torch.ldexp(torch.ldexp(terms, 25 - largest).trunc(), largest - 25).sum(-1)
        mantissa, exponent = torch.frexp(cut)
        total = torch.ldexp(torch.ldexp(mantissa, torch.tensor(24)).trunc(), exponent - 24)
    return total.float()


def test_sums_rounded_toward_zero(generator):
    """Why the logits kernel sets the target's logit apart. A dot product in fp32, rounded to nearest, less the sum over
    all ids is the wrong p - 1: it moves tokens away from their targets."""
    hidden, weight, targets = make_sure((4096, 48, 16, 24), 16, generator)
    logits, row = wgmma_logits(hidden, weight), torch.arange(16)
    error, limit = logits - hidden.double() @ weight.double().T, error_of_logits(hidden, weight, targets)
    assert (error[row, targets] < -1e-5).all() and (error.abs().amax(1) <= limit).all()

    log2e = torch.tensor(1.44269504)
    dot = (hidden.float() * weight[targets].float()).view(16, 32, -1).sum(1).sum(1)
    above = dot * log2e + 30
    terms = (logits * log2e - above[:, None]).exp2()
    assert ((dot * log2e - above).exp2() > terms.sum(1)).all()

    own = terms[row, targets]
    others = terms.index_put((row, targets), torch.tensor(0.0)).sum(1)
    nll, rest, _ = exact_sure(hidden, weight, targets)
    assert ((others / (others + own) - rest).abs() <= limit * rest).all()
    assert (((others / own).log1p() - nll).abs() <= limit * nll).all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_fused_adds_to_a_buffer(dtype, device, generator):
    hidden, weight, targets, weights = make((300, 72, 600, 1.0, 0), device, generator)
    want, _ = expected(hidden, weight, targets, weights, normalizer=9.0)
    before = torch.randn(weight.shape, generator=generator).to(dtype).to(device)
    added = []
    for start in (torch.zeros_like(before), before):
        buffer, leaf = start.clone(), hidden.detach().requires_grad_()
        keywords = {"normalizer": 9.0, "grad_weight": buffer, "chunk_rows": 256}
        illada.linear_masked_cross_entropy(leaf, weight, targets, weights, **keywords).backward()
        assert relative_error(leaf.grad.cpu(), want[2]) < 1e-2
        added.append(buffer.cpu().double() - start.cpu().double())
    assert relative_error(added[0], want[3]) < 1e-2
    assert relative_error(added[1], added[0]) < (1e-2 if dtype == BF16 else 1e-6)


def test_fused_is_repeatable_and_independent_of_chunks(device, generator):
    inputs = make((520, 64, 1000, 1.0, 0), device, generator)
    first, again, chunks = (
        results(illada.linear_masked_cross_entropy, *inputs, chunk_rows=rows) for rows in (None, None, 256)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[1], chunks[1]) and torch.equal(first[2], chunks[2])
    torch.testing.assert_close(first[3], chunks[3], rtol=1e-2, atol=1e-2)  # bfloat16, summed in another order


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_sparse_tokens_in_a_long_pack(dtype, device, generator):
    # Several rounds of the search for tokens; hidden in float32 under autocast is rounded on the way.
    tokens, width, vocab = 2500, 64, 300
    hidden = torch.full((tokens, width), torch.nan)
    weights = torch.zeros(tokens)
    chosen = torch.randperm(tokens, generator=generator)[:70].sort().values
    chosen[-1] = tokens - 1
    hidden[chosen] = torch.randn(70, width, generator=generator)
    weights[chosen] = 1 + torch.rand(70, generator=generator)
    weight, targets = (
        torch.randn(vocab, width, generator=generator),
        torch.randint(vocab, (tokens,), generator=generator),
    )
    inputs = [x.to(device) for x in (hidden.to(dtype), weight.to(dtype), targets.int(), weights)]
    with torch.autocast("cuda", BF16):
        got = results(illada.linear_masked_cross_entropy, *inputs)
        named = results(illada.linear_masked_cross_entropy, *inputs, rows=chosen.int().to(device))
    assert all(torch.equal(a, b) for a, b in zip(got, named, strict=True))
    part = [hidden[chosen].to(BF16), weight.to(BF16), targets[chosen], weights[chosen]]
    want, baseline = expected(*part)
    assert_close_like(got[3].to(baseline[3].dtype), want[3], baseline[3])
    assert_close_like(got[2][chosen].to(BF16), want[2], baseline[2])
    assert (got[2][weights == 0] == 0).all() and (got[1][weights == 0] == 0).all()


def test_rows_that_are_no_tokens_are_ignored(device, generator):
    hidden, weight, targets, weights = make((40, 64, 300, 1.0, 0), device, generator)
    rows = torch.tensor([-1, 3, 7, 40, 2**31 - 1], dtype=torch.int32, device=device)
    got = results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights, rows=rows)
    want = results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights, rows=rows[1:3].contiguous())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_bad_targets_leave_the_gradients_whole(spread, device, generator):
    hidden, weight, targets, weights = make((40, 64, 300, spread, 0), device, generator)
    rest = torch.arange(40, dtype=torch.int32, device=device)
    want = results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights, rows=rest[rest != 3])
    targets[3] = 300
    got = results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights)
    assert got[0].isnan() and got[1].isnan().nonzero().flatten().tolist() == [3]
    torch.testing.assert_close(got[2], want[2])
    torch.testing.assert_close(got[3], want[3])


def test_one_graph_for_any_number_of_masked_tokens(device, generator):
    """Capture fails where somebody waits; the tokens with a weight are counted anew in every replay."""
    hidden, weight, targets, weights = make((600, 64, 700, 1.0, 0), device, generator)
    size = raw.linear_masked_cross_entropy_workspace(hidden, weight, chunk_rows=256)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    d_hidden, d_weight = torch.zeros_like(hidden).contiguous(), torch.zeros(700, 64, device=device)
    nll, normalizer = torch.zeros(600, device=device), torch.tensor(3.0, device=device)
    given = weights.clone()

    def launch():
        raw.linear_masked_cross_entropy(
            *(nll, hidden, weight, targets, given), normalizer=normalizer, chunk_rows=256, hidden_grad=d_hidden,
            weight_grad=d_weight, workspace=workspace,
        )  # fmt: skip

    def clear():
        nll.zero_()
        d_hidden.zero_()

    launch()  # the kernels are loaded
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        launch()
    for share in (0.2, 1.0, 0.0, 0.6):  # one chunk, three, none, two
        given.copy_(torch.where(torch.rand(600, generator=generator).to(device) < share, weights, 0))
        clear()
        graph.replay()
        replayed = [x.clone() for x in (nll, d_hidden, d_weight)]
        clear()
        launch()
        assert all(torch.equal(a, b) for a, b in zip(replayed, (nll, d_hidden, d_weight), strict=True))
        assert ((nll != 0) == (given != 0)).all() and (d_weight.count_nonzero() > 0) == (share > 0)


# ----------------------------------------------------------------------------------------------------------- variants


def poisoned(size, device):
    """A workspace of NaNs: 0xff is one in every float format."""
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=device)


@pytest.fixture
def poison(monkeypatch):
    """Fill every workspace with NaNs."""
    make = torch.empty

    def empty(*size, dtype=None, device=None, **keywords):
        if dtype == torch.uint8 and device is not None:
            return poisoned(*size, device)
        return make(*size, dtype=dtype, device=device, **keywords)

    monkeypatch.setattr(torch, "empty", empty)


VARIANTS = [
    {"loss_gradients": "mm"},
    {"loss_order": "weight_first"},
    {"loss_gradients": "mm", "loss_order": "weight_first"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES[:-2])
def test_variants_match_fp64(case, variant, device, generator, poison):
    inputs = make(case, device, generator)
    with use_variants(**variant):
        got = results(illada.linear_masked_cross_entropy, *inputs, normalizer=12.5, chunk_rows=case[-1] or None)
    for name, g, w, b in zip(("loss", "nll", "dX", "dW"), got, *expected(*inputs, normalizer=12.5), strict=True):
        try:
            assert_close_like(g, w, b)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["found", "rows"])
def test_variants_with_any_number_of_tokens(given, variant, device, generator, poison):
    # None, one, one row more or less than a pair of tiles, and all: chunks full, in part, and empty.
    hidden, weight, targets, weights = make((600, 64, 700, 1.0, 0), device, generator)
    for count in (0, 1, 127, 128, 129, 255, 256, 257, 600):
        chosen = torch.randperm(600, generator=generator)[:count].sort().values.to(device)
        of_call = torch.zeros_like(weights)
        of_call[chosen] = weights[chosen]
        masked = hidden.clone()
        masked[of_call == 0] = torch.nan
        rows = {"rows": chosen.int()} if given else {}
        arguments = (masked, weight, targets, of_call)
        want = results(illada.linear_masked_cross_entropy, *arguments, normalizer=9.0, chunk_rows=256, **rows)
        with use_variants(**variant):
            got = results(illada.linear_masked_cross_entropy, *arguments, normalizer=9.0, chunk_rows=256, **rows)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert relative_error(got[2], want[2].double()) < 4e-3  # the last bit of bfloat16
        assert relative_error(got[3], want[3].double()) < 4e-3
        assert (got[2][of_call.cpu() == 0] == 0).all()


@pytest.mark.parametrize("value", ["8", "4"])
@pytest.mark.parametrize("filter_eps", [0.0, 1e-3])
def test_groups_of_tiles_change_no_bit(value, filter_eps, device, generator, poison):
    """Row tiles and columns of whole groups and of a smaller last one; two chunks."""
    inputs = make((2500, 2312, 300, 1.0, 0), device, generator)
    keywords = {"normalizer": 12.5, "chunk_rows": 2304, "filter_eps": filter_eps}
    want = results(illada.linear_masked_cross_entropy, *inputs, **keywords)
    with use_variants(loss_raster=value):
        got = results(illada.linear_masked_cross_entropy, *inputs, **keywords)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_one_gradient_by_mm(needed, device, generator, poison):
    hidden, weight, targets, weights = make((300, 72, 1001, 1.0, 0), device, generator)
    weights[::3] = 0
    grads = []
    for value in ("fused", "mm"):
        leaves = [x.detach().requires_grad_(name == needed) for name, x in (("hidden", hidden), ("weight", weight))]
        with use_variants(loss_gradients=value):
            illada.linear_masked_cross_entropy(*leaves, targets, weights).backward()
        grads.append(leaves[needed == "weight"].grad)
        assert leaves[needed != "weight"].grad is None
    assert relative_error(grads[1].cpu(), grads[0].cpu().double()) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_mm_adds_to_a_buffer(dtype, device, generator, poison):
    hidden, weight, targets, weights = make((300, 72, 600, 1.0, 0), device, generator)
    before = torch.randn(weight.shape, generator=generator).to(dtype).to(device)
    added = []
    for value in ("fused", "mm"):
        buffer, leaf = before.clone(), hidden.detach().requires_grad_()
        with use_variants(loss_gradients=value):
            illada.linear_masked_cross_entropy(
                leaf, weight, targets, weights, normalizer=9.0, grad_weight=buffer, chunk_rows=256
            ).backward()
        added.append(buffer.cpu().double() - before.cpu().double())
    assert relative_error(added[1], added[0]) < 1e-2


def test_mm_is_exact_whatever_the_filter(device, generator, poison):
    inputs = make((300, 64, 700, 3.0, 0), device, generator)
    with use_variants(loss_gradients="mm"):
        exact = results(illada.linear_masked_cross_entropy, *inputs)
        filtered = results(illada.linear_masked_cross_entropy, *inputs, filter_eps=0.5)
    assert all(torch.equal(a, b) for a, b in zip(filtered, exact, strict=True))


# --------------------------------------------------------------------------------------------------------- filter_eps


def test_filter_stays_within_its_bound(device, generator):
    """Two groups of 256 rows, each of which believes in one group of 256 ids."""
    width, eps = 128, 2.0**-12
    axes = torch.linalg.qr(torch.randn(width, 3, generator=generator)).Q.T
    group = torch.arange(512) // 256
    hidden = (14 * axes[group] + 0.3 * torch.randn(512, width, generator=generator)).to(BF16)
    weight = (axes[torch.arange(768) // 256] + 0.1 * torch.randn(768, width, generator=generator)).to(BF16)
    targets = 256 * group + torch.randint(256, (512,), generator=generator)
    weights = 1 + torch.rand(512, generator=generator)
    inputs = [x.to(device) for x in (hidden, weight, targets, weights)]
    exact = results(illada.linear_masked_cross_entropy, *inputs, normalizer=10.0)
    got = results(illada.linear_masked_cross_entropy, *inputs, normalizer=10.0, filter_eps=eps)
    assert torch.equal(got[0], exact[0]) and torch.equal(got[1], exact[1])  # the loss is exact

    probabilities = (hidden.double() @ weight.double().T).softmax(-1)
    top = probabilities.view(2, 256, 3, 256).amax((1, 3))
    assert (top >= eps).tolist() == [[True, False, False], [False, True, False]]
    g = weights.double() / 10
    for rows, left_out in ((slice(256), weight[256:]), (slice(256, 512), torch.cat([weight[:256], weight[512:]]))):
        error = (got[2].double() - exact[2].double())[rows].norm(dim=1)
        bound = g[rows] * eps * left_out.double().norm(dim=1).sum()
        assert (error <= bound + 2**-7 * exact[2][rows].double().norm(dim=1)).all()  # rounded to bfloat16
    error = (got[3].double() - exact[3].double()).norm(dim=1)
    assert (error <= eps * (g * hidden.double().norm(dim=1)).sum() + 1e-6).all()
    # And it does leave them out: nothing of the second group of rows in the first group of ids.
    rows = torch.arange(256, dtype=torch.int32, device=device)
    alone = results(illada.linear_masked_cross_entropy, *inputs, rows=rows, normalizer=10.0)
    torch.testing.assert_close(got[3][:256], alone[3][:256], rtol=1e-6, atol=1e-9)
    assert not torch.equal(got[3][:256], exact[3][:256])


# ------------------------------------------------------------------------------------------------- memory and errors


def test_workspace_of_the_papers_case(device):
    """8192 tokens, half of them masked: one chunk of probabilities, and little beside it; a quarter in memory mode."""
    hidden = torch.empty(8192, 4096, dtype=BF16, device="meta")
    weight = torch.empty(155136, 4096, dtype=BF16, device="meta")

    class Stand:  # the sizes of a tensor on the device, without its 1.3 GB
        def __init__(self, meta):
            self.shape, self.dtype, self.is_cuda, self.device = meta.shape, meta.dtype, True, torch.device("cuda", 0)
            self.stride, self.data_ptr, self.get_device = meta.stride, lambda: 256, lambda: 0

    stands = (Stand(hidden), Stand(weight))
    rows = Stand(torch.empty(4096, device="meta"))
    logits = 4096 * 155136 * 2
    assert logits < raw.linear_masked_cross_entropy_workspace(*stands, rows) < logits + 0.15e9
    assert raw.linear_masked_cross_entropy_workspace(*stands) < 1.4e9 + 0.15e9
    assert raw.linear_masked_cross_entropy_workspace(*stands, chunk_rows=1024) < 0.4e9
    no_gradients = {"hidden_grad": False, "weight_grad": False}
    assert raw.linear_masked_cross_entropy_workspace(*stands, rows, **no_gradients) < 0.06e9


def test_allocations_of_a_call(device, generator):
    hidden, weight, targets, weights = make((1024, 64, 5000, 1.0, 0), device, generator)
    leaves = [x.contiguous().requires_grad_() for x in (hidden, weight)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = illada.linear_masked_cross_entropy(*leaves, targets, weights, chunk_rows=256)
    chunk, d_weight, all_logits = 256 * 5120 * 2, 5000 * 64 * 4, 1024 * 5000 * 2
    assert torch.cuda.max_memory_allocated() - before < chunk + d_weight + 1_000_000 < all_logits / 2
    assert loss.isfinite()


def test_raw_errors(device, generator):
    hidden, weight, targets, weights = make((20, 64, 300, 1.0, 0), device, generator)
    size = raw.linear_masked_cross_entropy_workspace(hidden, weight)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    nll, d_weight = torch.zeros(20, device=device), torch.zeros(300, 64, device=device)

    def call(**changes):
        keywords = {"workspace": workspace, **changes}
        raw.linear_masked_cross_entropy(keywords.pop("nll", nll), keywords.pop("hidden", hidden), weight, targets, weights, **keywords)  # fmt: skip

    call(weight_grad=d_weight)
    for error, match, changes in [
        (ValueError, f"workspace must have {size} bytes, got {size - 1}", {"weight_grad": d_weight, "hidden_grad": torch.empty_like(hidden).contiguous(), "workspace": workspace[:-1]}),
        (ValueError, "workspace must be 16-byte aligned", {"workspace": workspace[1:]}),
        (ValueError, "gradients must be 16-byte aligned", {"weight_grad": torch.zeros(300 * 64 + 1, device=device)[1:].view(300, 64)}),
        (ValueError, "the weight's gradient must be float32 or bfloat16", {"weight_grad": d_weight.half()}),
        (ValueError, r"filter_eps must be in \[0, 1\), got 1", {"filter_eps": 1.0}),
        (ValueError, "chunk_rows must not be negative, got -1", {"chunk_rows": -1}),
        (ValueError, "scale must be finite", {"scale": float("inf")}),
        (ValueError, "overlap", {"nll": weights}),
        (NotImplementedError, "compute capability 9.0 .* width that is a multiple of 8", {"hidden": hidden[:, 1:]}),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call(**changes)
    assert raw.linear_masked_cross_entropy_workspace(hidden[:, 1:], weight[:, 1:]) is None
    assert raw.linear_masked_cross_entropy_workspace(hidden.half(), weight) is None
    assert raw.linear_masked_cross_entropy_workspace(hidden.cpu(), weight.cpu()) is None
