import gc
import math
import os
import pathlib
import subprocess
import sys
import textwrap
import warnings
import weakref

import pytest
import torch

from tinylora_kernels.factors import subspace
from tinylora_kernels.factors import svd as factors
from tinylora_kernels.factors.svd import (
    basis_sketch,
    canonical_signs,
    compare_sketch,
    factorize_many,
    truncated_svd,
    weight_fingerprint,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
INDEX = torch.arange(1, 513, dtype=torch.float64)


def head(values, tail):
    return torch.cat([torch.tensor(values, dtype=torch.float64), tail[len(values):]])


SPECTRA = {
    "decaying": INDEX**-0.5,
    "slow": INDEX**-0.2,
    "fast": 1 / INDEX,
    "exponential": torch.exp(-INDEX / 20),
    "spiked": head([1000, 500], INDEX**-0.1),
    "one spike": head([1e4], INDEX**-0.3),
    "low share": head([1], 1e-4 * INDEX**-0.5),
    "tight gap": head([2, 1.5, 1.5 * (1 - 1e-3)], INDEX**-0.5),
    "tighter gap": head([2, 1.5, 1.5 * (1 - 2e-5)], INDEX**-0.5),
    "cluster": head([2 - 1e-3 * i for i in range(20)], INDEX**-0.5),
    "linear": 2 - INDEX / 512,
    "low rank": torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def with_spectrum(m, n, sigma, seed=0):
    """A matrix [m, n] in fp64 with the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = min(len(sigma), m, n)
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q for size in (m, n))
    return (u * sigma[:k]) @ v.T


def gaussian(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def reference(weight, rank):
    """basis [r, out] and sigma by LAPACK in fp64, with the signs of the package."""
    u, sigma, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    return canonical_signs(u.T[:rank]), sigma[:rank]


def delta(weight, basis, sigma):
    """dW = U M U^T W for the M of scaling="left" with a fixed R."""
    r = len(sigma)
    mixed = torch.arange(1.0, r * r + 1, dtype=torch.float64).view(r, r).sin()
    basis, sigma = basis.double(), sigma.double()
    return basis.T @ ((sigma[:, None] * mixed / sigma) @ (basis @ weight.double()))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------- the triplets


@pytest.mark.parametrize("shape", [(512, 768), (768, 512)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_matches_lapack_on_every_spectrum(spectrum, shape):
    weight = with_spectrum(*shape, SPECTRA[spectrum]).float()
    result = truncated_svd(weight, 2, cache=False)
    basis, sigma = reference(weight, 2)
    assert result.residual < 1e-5 and not result.degenerate
    assert result.basis.dtype == result.sigma.dtype == torch.float32
    assert result.basis.is_contiguous() and result.basis.shape == (2, shape[0])
    assert torch.allclose(result.sigma.double(), sigma, rtol=2e-7, atol=0)
    assert (result.basis.double() - basis).norm(dim=1).max() < 2e-6
    # the adapter itself; S^-1 and S magnify what rounding U to fp32 leaves by their ratio
    bound = 2e-6 * max(1.0, (sigma[0] / sigma[1]).item())
    assert relative(delta(weight, result.basis, result.sigma), delta(weight, basis, sigma)) < bound


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 17])
@pytest.mark.parametrize("shape", [(300, 500), (640, 257)])
def test_flat_spectrum_at_every_rank(shape, rank):
    weight = gaussian(*shape)
    result = truncated_svd(weight, rank, cache=False)
    basis, sigma = reference(weight, rank)
    assert result.residual < 1e-5 and not result.degenerate
    assert (result.basis.double() - basis).norm(dim=1).max() < 2e-6
    assert torch.allclose(result.sigma.double(), sigma, rtol=2e-7, atol=0)


@pytest.mark.parametrize("spectrum", ["decaying", "spiked", "tight gap"])
def test_reported_residual_is_the_true_one(spectrum):
    weight = with_spectrum(400, 600, SPECTRA[spectrum])
    found = subspace.leading_triplets(weight.float(), 2, 1e-5, torch.float32)
    u, sigma = found.left[:2], found.sigma[:2]
    w = weight.float().double()
    v = u @ w @ w.T @ u.T  # [2, 2], diagonal for singular vectors
    assert torch.allclose(v, torch.diag(sigma**2), rtol=1e-9, atol=1e-9 * sigma[0].item() ** 2)
    # v_i is the right vector the u_i was made from: W v = sigma u
    right = torch.linalg.lstsq(w, (sigma.unsqueeze(1) * u).T).solution.T
    true = (u @ w - sigma.unsqueeze(1) * right).norm(dim=1) / sigma
    assert (true < 1.01 * found.residual[:2] + 1e-9).all()
    assert (true < 1e-5).all()


def test_basis_is_orthonormal():
    basis = truncated_svd(with_spectrum(512, 700, SPECTRA["one spike"]), 4, cache=False).basis
    assert basis.dtype == torch.float64
    assert torch.allclose(basis @ basis.T, torch.eye(4, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype(dtype):
    weight = with_spectrum(256, 384, SPECTRA["decaying"]).to(dtype)
    result = truncated_svd(weight, 2, cache=False)
    basis, sigma = reference(weight, 2)
    exact = dtype == torch.float64
    assert result.basis.dtype == (torch.float64 if exact else torch.float32)
    assert relative(result.basis, basis) < 2e-6
    assert relative(result.sigma, sigma) < (1e-11 if exact else 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_and_its_fp32_copy_have_the_same_bits(dtype):
    weight = with_spectrum(512, 300, SPECTRA["slow"]).to(dtype)
    half, single = truncated_svd(weight, 2, cache=False), truncated_svd(weight.float(), 2, cache=False)
    assert torch.equal(half.basis, single.basis) and torch.equal(half.sigma, single.sigma)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (17, 4), (30, 30), (193, 200)])
def test_small_matrices_at_full_rank(shape):
    weight = gaussian(*shape)
    rank = min(shape)
    result = truncated_svd(weight, rank, cache=False)
    basis, sigma = reference(weight, rank)
    assert torch.allclose(result.sigma.double(), sigma, rtol=1e-6)
    assert (result.basis.double() - basis).norm(dim=1).max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # read in place, and converted piece by piece
def test_strides_do_not_matter(dtype):
    weight = with_spectrum(300, 420, SPECTRA["decaying"]).to(dtype)
    expected = truncated_svd(weight, 2, cache=False)
    stored = weight.clone()
    padded = torch.full((300, 1000), math.nan, dtype=dtype)
    padded[:, 100:520] = weight
    strided = torch.full((600, 840), math.nan, dtype=dtype)
    strided[::2, ::2] = weight
    for view in (weight.T.contiguous().T, padded[:, 100:520], strided[::2, ::2], torch.nn.Parameter(weight)):
        result = truncated_svd(view, 2, cache=False)
        assert relative(result.basis, expected.basis) < 1e-6
        assert weight_fingerprint(view) == weight_fingerprint(weight)
    assert torch.equal(weight, stored)


@pytest.mark.parametrize("factor, dtype", [(1e-30, torch.float32), (1e30, torch.float32), (1e-200, torch.float64),
                                           (1e200, torch.float64)])
@pytest.mark.parametrize("shape", [(40, 30), (256, 300)])
def test_extreme_magnitudes(shape, factor, dtype):
    weight = with_spectrum(*shape, SPECTRA["decaying"]).to(dtype)
    expected, result = truncated_svd(weight, 2, cache=False), truncated_svd(weight * factor, 2, cache=False)
    assert relative(result.basis, expected.basis) < 1e-6
    assert relative(result.sigma / factor, expected.sigma) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 10, 11, 12, 13, 14])
def test_steps_that_do_not_suffice_fall_back_to_the_full_decomposition(monkeypatch, steps):
    monkeypatch.setattr(subspace, "MAX_STEPS", steps)  # up to both sides of a compression of the space
    monkeypatch.setattr(subspace, "BLOCKS_KEPT", 6)
    called = []
    direct = factors._direct
    monkeypatch.setattr(factors, "_direct", lambda *arguments: called.append(1) or direct(*arguments))
    weight = gaussian(300, 400)
    result = truncated_svd(weight, 2, cache=False)
    assert (called and result.residual < 1e-12) or (steps > 10 and result.residual < 1e-5)
    assert relative(result.basis, reference(weight, 2)[0]) < 1e-6


@pytest.fixture
def passes(monkeypatch):
    """Of every pass over a weight: rows of the weight, vectors multiplied, precision."""
    made = []
    multiply = subspace.multiply

    def recorded(space, rows, dtype, left, image):
        made.append((len(space.weight), len(rows), dtype))
        multiply(space, rows, dtype, left, image)

    monkeypatch.setattr(subspace, "multiply", recorded)
    return made


@pytest.mark.parametrize("spectrum, most", [("decaying", 7), ("fast", 5), ("spiked", 3), ("slow", 11)])
def test_few_passes_over_the_weight(passes, spectrum, most):
    truncated_svd(with_spectrum(512, 768, SPECTRA[spectrum]).float(), 2, cache=False)
    assert passes[: subspace.SAMPLE_STEPS] == [(64, 8, torch.float32)] * subspace.SAMPLE_STEPS
    whole = passes[subspace.SAMPLE_STEPS :]
    assert 2 <= len(whole) <= most and all(rows == 512 for rows, _, _ in whole)
    precisions = [dtype for _, _, dtype in whole]
    assert precisions.count(torch.float64) <= 2 and precisions[-1] == torch.float64


def test_a_settled_space_grows_by_less_than_a_block(passes):
    truncated_svd(with_spectrum(512, 768, SPECTRA["slow"]).float(), 2, cache=False)
    search = [vectors for rows, vectors, dtype in passes if rows == 512 and dtype == torch.float32]
    assert search[0] == 8 and search[-1] == 4 and search == sorted(search, reverse=True)


@pytest.mark.parametrize("sampled", [1.0, 0.0])
def test_rows_outside_the_sample_count(sampled):
    """The sampled rows span other columns than the leading vectors, or are zero."""
    weight = torch.zeros(640, 512)
    weight[:: subspace.SAMPLE_STRIDE, :256] = sampled * gaussian(80, 256)
    weight[1 :: subspace.SAMPLE_STRIDE, 256:] = 1.5 * gaussian(80, 256, seed=1)
    result = truncated_svd(weight, 2, cache=False)
    assert (result.basis.double() - reference(weight, 2)[0]).norm(dim=1).max() < 2e-6


def test_products_of_low_precision_end_the_search(passes, monkeypatch):
    """fp32 products made in TF32 or bf16 (torch.set_float32_matmul_precision) must not search for ever."""
    weight = gaussian(400, 300)
    expected = reference(weight, 2)[0]
    multiply = subspace.multiply

    def coarse(space, rows, dtype, left, image):
        multiply(space, rows, dtype, left, image)
        if dtype == torch.float32:
            left.copy_(left.bfloat16())
            image.copy_(image.bfloat16())

    monkeypatch.setattr(subspace, "multiply", coarse)
    assert relative(truncated_svd(weight, 2, cache=False).basis, expected) < 2e-6
    assert len(passes) < 100


def test_search_with_and_without_the_kernel(monkeypatch):
    """Transposed weights, other devices and builds without the library multiply by torch."""
    weight = with_spectrum(512, 768, SPECTRA["slow"]).bfloat16()
    expected = truncated_svd(weight, 2, cache=False)
    monkeypatch.setattr(subspace.native, "can_multiply", lambda weight: False)
    assert relative(truncated_svd(weight, 2, cache=False).basis, expected.basis) < 2e-6


def test_autocast_and_defaults_do_not_matter(two_default_dtypes):
    weight = gaussian(400, 300)
    expected = truncated_svd(weight, 2, cache=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(truncated_svd(weight, 2, cache=False).basis, expected.basis)
    for dtype in two_default_dtypes:
        torch.set_default_dtype(dtype)
        assert torch.equal(truncated_svd(weight, 2, cache=False).basis, expected.basis)


@pytest.fixture
def two_default_dtypes():
    yield torch.bfloat16, torch.float64
    torch.set_default_dtype(torch.float32)


def test_low_rank_is_refused_without_a_full_decomposition(monkeypatch):
    monkeypatch.setattr(factors, "_direct", lambda *arguments: pytest.fail("full decomposition"))
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.outer(gaussian(1, 900)[0], gaussian(1, 700)[0]).to(dtype)
        with pytest.raises(ValueError, match="numerical rank is 1, below rank 2"):
            truncated_svd(weight, 2, cache=False)


def test_random_state_is_untouched_and_runs_agree():
    weight = with_spectrum(400, 300, SPECTRA["slow"]).float()
    state = torch.get_rng_state()
    first = truncated_svd(weight, 2, cache=False)
    torch.manual_seed(5)
    second = truncated_svd(weight, 2, cache=False)
    assert torch.equal(first.basis, second.basis) and torch.equal(first.sigma, second.sigma)
    torch.set_rng_state(state)
    truncated_svd(weight, 2, cache=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_thread_count_does_not_change_a_bit(dtype):
    weight = with_spectrum(1500, 700, SPECTRA["slow"]).to(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(truncated_svd(weight, 2, cache=False))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0].basis, other.basis) for other in results[1:])
    assert all(torch.equal(results[0].sigma, other.sigma) for other in results[1:])


THREADS_SCRIPT = textwrap.dedent("""
    import sys, torch
    from tinylora_kernels.factors.svd import truncated_svd
    weights = torch.load(sys.argv[1])
    torch.save([truncated_svd(w, 2, cache=False).__dict__ for w in weights], sys.argv[2])
""")


def run(script, *arguments, threads=1, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                   "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], env=environment, check=True,
                          capture_output=True, text=True)


def test_thread_counts_give_the_same_adapter(tmp_path):
    kinds = ["decaying", "tight gap", "tighter gap", "cluster"]
    weights = [with_spectrum(512, 700, SPECTRA[kind]).bfloat16() for kind in kinds] + [gaussian(300, 256)]
    torch.save(weights, tmp_path / "weights")
    results = {}
    for threads in (1, 2):
        run(THREADS_SCRIPT, tmp_path / "weights", tmp_path / f"{threads}", threads=threads)
        results[threads] = torch.load(tmp_path / f"{threads}")
    for weight, one, two in zip(weights, results[1], results[2], strict=True):
        assert (one["basis"] - two["basis"]).norm(dim=1).max() < 2e-6
        dw = [delta(weight, result["basis"], result["sigma"]) for result in (one, two)]
        assert relative(*dw) < 1e-5
        assert compare_sketch(basis_sketch(one["basis"]), basis_sketch(two["basis"])) < 1e-5


# ---------------------------------------------------------------- degenerate spectra


@pytest.mark.parametrize("values, degenerate", [
    ([2, 2, 1], True),  # inside the rank
    ([2, 1.5, 1.5], True),  # across its edge
    ([2, 1.5, 1.2, 1.2, 1.2], False),  # beyond it
    ([2, 1.5, 1.5 * (1 - 1e-7)], True),  # closer than DEGENERATE_GAP
    ([2, 1.5, 1.5 * (1 - 1e-5)], False),
])
def test_equal_singular_values_are_reported(values, degenerate):
    weight = with_spectrum(400, 500, head(values, INDEX**-0.5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = truncated_svd(weight, 2, name="layers.3.q_proj", cache=False)
    assert result.degenerate == degenerate
    assert [str(warning.message).startswith("layers.3.q_proj: ") for warning in caught] == [True] * degenerate
    assert all("\n" not in str(warning.message) for warning in caught)
    # the span of the first two is right even where the vectors are not unique
    if values[0] == values[1]:
        basis = reference(weight, 2)[0]
        assert relative(result.basis.T @ result.basis, basis.T @ basis) < 1e-5


@pytest.mark.parametrize("weight", [torch.eye(300), torch.eye(3), 2 * torch.linalg.qr(gaussian(256, 256)).Q])
def test_orthogonal_matrix_is_degenerate(weight):
    with pytest.warns(UserWarning, match="weight: leading singular values coincide"):
        result = truncated_svd(weight, 2, cache=False)
    assert result.degenerate and result.residual < 1e-5


def test_many_equal_values_hide_nothing():
    weight = with_spectrum(400, 500, head([3.0] * 20, INDEX**-0.5))
    with pytest.warns(UserWarning, match="coincide"):
        result = truncated_svd(weight, 4, cache=False)
    assert torch.allclose(result.sigma, torch.full((4,), 3.0, dtype=torch.float64), rtol=1e-9)


# ---------------------------------------------------------------- signs


def test_largest_entry_is_positive():
    basis = truncated_svd(gaussian(300, 260), 4, cache=False).basis
    top = basis.abs().amax(dim=1, keepdim=True)
    assert (basis.gather(1, (basis.abs() >= (1 - 1e-3) * top).int().argmax(1, keepdim=True)) > 0).all()


def test_signs_do_not_depend_on_the_sign_of_the_weight_or_the_order_of_inputs():
    weight = with_spectrum(300, 400, SPECTRA["decaying"]).float()
    expected = truncated_svd(weight, 2, cache=False)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    for other in (-weight, weight[:, order], weight * 3):
        assert relative(truncated_svd(other, 2, cache=False).basis, expected.basis) < 1e-6


def test_entries_of_equal_magnitude_do_not_flip():
    # Hadamard-like rows: every entry has the same magnitude, rounding alone would pick the sign
    left = torch.ones(2, 64, dtype=torch.float64)
    left[0, 1::2] = -1
    left[1, 3::4] = -1
    left /= 8
    expected = canonical_signs(left)
    assert (expected[:, 0] > 0).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        noise = 1e-6 * torch.randn(left.shape, generator=generator, dtype=torch.float64)
        sign = 1 if torch.rand(1, generator=generator) < 0.5 else -1
        assert torch.equal(canonical_signs(sign * (left + noise)).sign(), expected.sign())


# ---------------------------------------------------------------- bad input


def poisoned(value):
    weight = gaussian(40, 30)
    weight[7, 11] = value
    return weight


@pytest.mark.parametrize("weight, rank, message", [
    (gaussian(4, 4)[0], 1, r"expected a 2-D weight \[out, in\], found shape \[4\]"),
    (torch.randn(2, 3, 4), 1, r"found shape \[2, 3, 4\]"),
    (torch.empty(0, 5), 1, r"empty, shape \[0, 5\]"),
    (torch.ones(4, 4, dtype=torch.int8), 1, "found torch.int8; dequantise"),
    (torch.empty(4, 4, device="meta"), 1, "meta device"),
    (gaussian(4, 7), 5, r"rank must be from 1 to min\(out, in\) = 4, got 5"),
    (gaussian(4, 7), 0, "got 0"),
    (poisoned(math.nan), 2, "NaN or infinite"),
    (poisoned(-math.inf), 2, "NaN or infinite"),
    (poisoned(math.nan).bfloat16(), 2, "NaN or infinite"),
    (torch.zeros(30, 40), 2, "usable rank is 0"),
    (torch.ones(30, 40), 2, "numerical rank is 1, below rank 2; use a rank of at most 1"),
    (torch.outer(gaussian(1, 400)[0], gaussian(1, 500)[0]), 2, "numerical rank is 1, below rank 2"),
    (torch.outer(gaussian(1, 400)[0], gaussian(1, 500)[0]).bfloat16(), 2, "numerical rank is 1, below rank 2"),
    (with_spectrum(300, 400, torch.tensor([3.0, 2.0, 1.0])), 4, "numerical rank is 3, below rank 4"),
    (with_spectrum(300, 400, torch.tensor([3.0, 2.0, 1.0])).float(), 8, "numerical rank is 3, below rank 8"),
    (with_spectrum(300, 400, head([1], 1e-7 * INDEX**-0.5)), 2, "numerical rank is 1"),
])
def test_bad_input_is_one_line_naming_the_module(weight, rank, message):
    with pytest.raises(ValueError, match=message) as caught:
        truncated_svd(weight, rank, name="layers.0.up_proj", cache=False)
    text = str(caught.value)
    assert text.startswith("layers.0.up_proj: ") and "\n" not in text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 7, 39])
def test_a_bad_value_is_found_wherever_it_is(monkeypatch, value, row):
    monkeypatch.setattr(factors, "PIECE_ELEMENTS", 100)  # 3 rows at a time
    weight = gaussian(40, 30)
    weight[row, 11] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        truncated_svd(weight, 2, cache=False)


# ---------------------------------------------------------------- many weights


def test_many_weights_one_at_a_time_in_order():
    alive = []

    def source(seed):
        def load():
            gc.collect()
            assert not any(reference() is not None for reference in alive), "the previous weight is still held"
            weight = gaussian(40, 30, seed)
            alive.append(weakref.ref(weight))
            return weight
        return load

    names = [f"layers.{i}" for i in range(5)]
    results = list(factorize_many([(name, source(i)) for i, name in enumerate(names)], 2, progress=False))
    assert [name for name, _ in results] == names and len(alive) == 5
    for seed, (_, result) in enumerate(results):
        expected = truncated_svd(gaussian(40, 30, seed), 2, cache=False)
        assert torch.equal(result.basis, expected.basis) and torch.equal(result.sigma, expected.sigma)


def test_many_weights_name_the_bad_one():
    items = [("good", gaussian(40, 30)), ("bad", poisoned(math.nan))]
    with pytest.raises(ValueError, match="^bad: the weight holds NaN"):
        list(factorize_many(items, 2, progress=False))


# VmHWM belongs to the process's own memory; ru_maxrss starts at the peak of whoever started the process, here pytest.
MEMORY_SCRIPT = textwrap.dedent("""
    import torch
    from tinylora_kernels.factors.svd import truncated_svd
    truncated_svd(torch.randn(600, 700), 2, cache=False)  # libraries and their pools
    m, n = 12288, 2048
    weight = torch.empty(m, n, dtype=torch.bfloat16)
    column = torch.arange(1, n + 1) ** -0.5
    for begin in range(0, m, 256):
        weight[begin:begin + 256] = torch.randn(256, n) * column
    def memory(name):
        return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name)))
    now = memory("VmRSS")
    result = truncated_svd(weight, 2)
    assert result.residual < 1e-5
    print((memory("VmHWM") - now) / (weight.numel() * weight.element_size()))
""")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")
def test_peak_extra_memory_is_below_two_copies():
    copies = float(run(MEMORY_SCRIPT).stdout)
    assert copies < 1.0  # of the bf16 weight; 2 is the promise


# ---------------------------------------------------------------- sketches


def test_sketch_estimates_the_distance_of_bases():
    basis = torch.linalg.qr(gaussian(600, 3)).Q.T.contiguous()
    sketch = basis_sketch(basis)
    assert sketch.shape == (3, 4) and sketch.dtype == torch.float32
    assert compare_sketch(sketch, basis_sketch(basis)) == 0.0
    generator = torch.Generator().manual_seed(1)
    for size in (1e-4, 1e-2):
        estimates = []
        for _ in range(20):
            noise = torch.randn(3, 600, generator=generator)
            noise *= size / noise.norm(dim=1, keepdim=True)
            estimates.append(compare_sketch(sketch, basis_sketch(basis + noise)))
        assert size / 5 < min(estimates) and max(estimates) < 10 * size
    flipped = basis.clone()
    flipped[1] *= -1
    assert compare_sketch(sketch, basis_sketch(flipped)) == pytest.approx(2.0)


def test_sketch_known_answer():
    basis = torch.eye(2, 5)
    expected = ("-0x1.089556p-1 -0x1.13eff6p-1 -0x1.0efd04p-2 -0x1.04ac1cp+0 "
                "0x1.ffe338p-1 -0x1.610c16p+0 -0x1.c2fdfp+0 0x1.008418p+0")
    assert basis_sketch(basis).flatten().tolist() == [float.fromhex(text) for text in expected.split()]


def test_sketch_comparison_edges():
    with pytest.raises(ValueError, match=r"one shape, got \[2, 4\] and \[3, 4\]"):
        compare_sketch(torch.ones(2, 4), torch.ones(3, 4))
    assert compare_sketch(torch.ones(2, 4), torch.full((2, 4), math.nan)) == math.inf
