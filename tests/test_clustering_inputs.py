"""Every form in which the estimators may be given tokens, and what they refuse."""

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from token_samples import assert_same_clustering, clusters, noise
from torch import Tensor

from spt_fast.clustering import KMeans, MiniBatchKMeans
from spt_fast.errors import InputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Chunks:
    """A source that is made anew at each pass, and counts how often its chunks are read."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make
        self.begun = 0
        self.finished = 0

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        yield from self._make()
        self.finished += 1


def contents(value: Any) -> Any:
    """All that an estimator holds, down to the numbers."""
    if isinstance(value, (Tensor, np.ndarray)):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: contents(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [contents(each) for each in value]
    return contents(vars(value)) if type(value).__module__.startswith("spt_fast") else repr(value)


# --- Sources -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 3000), max_size=8),
    seed=st.integers(0, 1000),
    init=st.sampled_from(["k-means++", "random"]),
)
def test_any_chunking_is_the_same_as_in_memory(cuts, seed, init):
    # 3,000 tokens and K=2: more than the sample of 2,048 that seeds are drawn from.
    tokens = clusters(3, 3000, 5, seed=4, spread=1.0)
    chunks = list(torch.tensor_split(tokens, sorted(cuts)))
    whole, parts = (
        KMeans(2, init=init, random_state=seed).fit(each) for each in (tokens, Chunks(lambda: iter(chunks)))
    )
    assert_same_clustering(whole, parts)
    assert not hasattr(parts, "labels_")
    assert torch.equal(parts.predict(chunks), whole.predict(tokens))


def test_seeds_are_the_same_however_the_tokens_are_cut():
    tokens = noise(2, 5000, 4)
    start = {"n_clusters": 3, "random_state": 5, "max_iter": 1, "tol": 1e9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        whole = KMeans(**start).fit(tokens)
        parts = KMeans(**start).fit(list(tokens.split(777, dim=1)))
    torch.testing.assert_close(whole.cluster_centers_, parts.cluster_centers_)


def test_a_source_is_read_once_per_pass():
    tokens = clusters(6, 3000, 5, spread=1.0)
    source = Chunks(lambda: iter(tokens.split(512)))
    fitted = KMeans(6, random_state=0).fit(source)
    # Once to look it over, once per pass, once to count in the end.
    assert source.begun == source.finished == 1 + fitted.n_iter_ + 1
    source = Chunks(lambda: iter(tokens.split(512)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(6, random_state=0, n_init=3, max_iter=4).fit(source)
    assert source.finished <= 1 + 3 * (4 + 1)
    source.begun = 0
    fitted.predict(source)
    assert source.begun == 1


def test_moving_empty_clusters_costs_one_more_pass_for_all_layers_together():
    tokens = clusters(6, 600, 5)
    layers = torch.stack([tokens, tokens + 1, tokens - 1])
    init = layers[:, :6].clone()
    init[:, 2:4] = 1e4
    source = Chunks(lambda: iter(layers.split(100, dim=1)))
    fitted = KMeans(6, init=init).fit(source)
    assert source.finished == 1 + fitted.n_iter_ + 1 + 1


def test_what_can_be_read_only_once_is_refused():
    for once in (iter([noise(9, 2)]), (chunk for chunk in [noise(9, 2)]), map(Tensor.float, [noise(9, 2)])):
        with pytest.raises(InputError, match="X can be read only once, as it is an iterator.*starts over"):
            KMeans(2).fit(once)

    class Exhausted:
        def __init__(self) -> None:
            self.chunks = iter([noise(9, 2), noise(9, 2)])

        def __iter__(self) -> Iterator[Tensor]:
            return self.chunks

    with pytest.raises(
        InputError, match="X yielded 18 tokens when it was read first, and 0 when it was read"
    ):
        KMeans(2).fit(Exhausted())


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("form", ["float32", "float64", "float16", "int32", "uint8", "big endian"])
def test_numpy_arrays_and_memory_maps_give_the_same_result(form, layered, tmp_path):
    tokens = (10 * clusters(4, 300, 6)).round().clamp(0, 200).numpy()
    tokens = tokens.reshape(2, 150, 6) if layered else tokens
    array = tokens.astype(">f4" if form == "big endian" else form)
    array.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=array.dtype, mode="r", shape=array.shape)
    expected = KMeans(4, random_state=0).fit(torch.from_numpy(tokens.copy()))
    for source in (array, mapped, array[..., ::1, :], np.asfortranarray(array)):
        found = KMeans(4, random_state=0).fit(source)
        assert isinstance(found.cluster_centers_, np.ndarray) and isinstance(found.labels_, np.ndarray)
        np.testing.assert_array_equal(found.cluster_centers_, expected.cluster_centers_.numpy())
        np.testing.assert_array_equal(found.labels_, expected.labels_.numpy())
        assert found.transform(source).dtype == (np.float64 if form == "float64" else np.float32)
        assert isinstance(found.score(source), np.ndarray if layered else float)


def test_a_memory_map_is_converted_piece_by_piece(tmp_path, monkeypatch):
    from spt_fast.clustering import sources

    tokens = clusters(3, 5000, 4).double().numpy()
    tokens.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=np.float64, mode="r", shape=tokens.shape)
    whole = KMeans(3, random_state=0).fit(tokens)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000 * 4 * 8)
    lengths = []
    as_chunk = sources.as_chunk
    monkeypatch.setattr(
        sources, "as_chunk", lambda x, **kwargs: lengths.append(x.shape[-2]) or as_chunk(x, **kwargs)
    )
    pieces = KMeans(3, random_state=0).fit(mapped)
    assert set(lengths) == {1, 1000}  # one token to see whether anything has to be converted
    np.testing.assert_allclose(pieces.cluster_centers_, whole.cluster_centers_, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pieces.labels_, whole.labels_)
    weights = np.arange(5000) % 2
    np.testing.assert_allclose(
        KMeans(3, init=tokens[:3]).fit(mapped, sample_weight=weights).cluster_centers_,
        KMeans(3, init=tokens[:3]).fit(tokens, sample_weight=weights).cluster_centers_,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::3, 1:],
        lambda x: x.T,
        lambda x: x[:, 1:2].expand(-1, 4) if isinstance(x, Tensor) else np.broadcast_to(x[:, 1:2], (300, 4)),
        lambda x: x.flip(0) if isinstance(x, Tensor) else x[::-1],
    ],
    ids=["every other column", "every third row", "transposed", "expanded", "backwards"],
)
def test_strided_tokens_are_as_good_as_packed_ones(view):
    tokens = clusters(3, 300, 8)
    strided, array = view(tokens), view(tokens.numpy())
    packed = strided.contiguous()
    for source in (strided, array):
        found = KMeans(3, random_state=1).fit(source)
        np.testing.assert_allclose(
            np.asarray(found.cluster_centers_),
            KMeans(3, random_state=1).fit(packed).cluster_centers_.numpy(),
            rtol=1e-4,
            atol=1e-4,
        )


def test_results_come_back_in_the_form_of_the_input():
    tokens = clusters(3, 90, 4)
    table = KMeans(3, random_state=0).fit(tokens.tolist())
    np.testing.assert_allclose(
        table.cluster_centers_, KMeans(3, random_state=0).fit(tokens.numpy()).cluster_centers_, rtol=1e-5
    )
    assert isinstance(table.cluster_centers_, np.ndarray)
    for chunk, kind in ((tokens, Tensor), (tokens.numpy(), np.ndarray), (tokens[None].numpy(), np.ndarray)):
        cut = [chunk[..., :40, :], chunk[..., 40:, :]]
        for source in (chunk, cut, tuple(cut), Chunks(lambda cut=cut: iter(cut))):
            fitted = KMeans(3, random_state=0).fit(source)
            shape = (1, 3, 4) if chunk.ndim == 3 else (3, 4)
            assert isinstance(fitted.cluster_centers_, kind) and fitted.cluster_centers_.shape == shape
            assert isinstance(fitted.predict(source), kind)
            assert fitted.predict(source).shape == shape[:-2] + (90,)
            assert fitted.transform(source).shape == shape[:-2] + (90, 3)
    # What was fitted on one kind is asked about another.
    fitted = KMeans(3, random_state=0).fit(tokens.numpy())
    assert isinstance(fitted.predict(tokens), Tensor)
    assert fitted.predict(tokens[:0]).shape == (0,)


def test_a_data_frame_keeps_its_names():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(clusters(3, 60, 2).numpy(), columns=["a", "b"])
    fitted = KMeans(3, random_state=0).fit(frame)
    assert fitted.feature_names_in_.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(frame.rename(columns={"a": "c"}))
    fitted.fit(torch.from_numpy(frame.to_numpy()))
    assert not hasattr(fitted, "feature_names_in_")


def test_labels_of_an_earlier_fit_do_not_linger():
    tokens = clusters(3, 90, 4)
    fitted = KMeans(3, random_state=0).fit(tokens)
    fitted.fit([tokens])
    assert not hasattr(fitted, "labels_")
    fitted.fit(tokens)
    fitted.load_state_dict(KMeans(3, random_state=0).fit(tokens + 1).state_dict())
    assert not hasattr(fitted, "labels_")


# --- What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "x", "message"),
    [
        ({"n_clusters": 0}, torch.zeros(4, 2), "n_clusters must be at least 1, got 0"),
        ({"n_clusters": True}, torch.zeros(4, 2), "n_clusters must be at least 1, got True"),
        ({"n_clusters": 2.0}, torch.zeros(4, 2), "n_clusters must be at least 1, got 2.0"),
        ({"n_init": 0}, torch.zeros(4, 2), "n_init must be at least 1, got 0"),
        ({"max_iter": -1}, torch.zeros(4, 2), "max_iter must be at least 1, got -1"),
        ({"n_clusters": 5}, torch.zeros(4, 2), "X holds 4 tokens, fewer than n_clusters=5"),
        ({"n_clusters": 1}, torch.zeros(0, 2), "X holds 0 tokens, fewer than n_clusters=1"),
        ({}, torch.zeros(4), r"X must be a tensor or array \[T, D\] or \[L, T, D\].* got \[4\]"),
        ({}, torch.zeros(4, 2, dtype=torch.complex64), "X must hold real numbers, got torch.complex64"),
        ({}, np.zeros((1, 4, 2), dtype=complex), "X must hold real numbers, got complex128"),
        ({}, [torch.zeros(4, 2), [1.0]], "X must be a tensor or array .* got list"),
        (
            {},
            [torch.zeros(4, 2), torch.zeros(4, 3)],
            r"X: chunk 1 is \[4, 3\], and the chunks before it differ",
        ),
        ({}, [torch.zeros(4, 2), torch.zeros(1, 4, 2)], r"X: chunk 1 is \[1, 4, 2\]"),
        ({}, Chunks(lambda: iter([])), "X (yields no|holds 0) tokens"),
        ({"dtype": torch.float64}, torch.zeros(4, 2), "dtype must be float32, float16 or bfloat16"),
        (
            {"init": "best"},
            torch.zeros(4, 2),
            "init must be 'k-means\\+\\+' or 'random' or the centres .* 'best'",
        ),
        ({"init": None}, torch.zeros(4, 2), "init must be .* got None"),
        (
            {"init": torch.zeros(3, 2)},
            torch.zeros(4, 2),
            r"init must hold the centres \[1, 2, 2\], got \[3, 2\]",
        ),
        (
            {"init": torch.zeros(2, 2)},
            torch.zeros(3, 4, 2),
            r"init must hold the centres \[3, 2, 2\], got \[2, 2\]",
        ),
        ({"init": torch.full((2, 2), float("nan"))}, torch.zeros(4, 2), "init holds NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("estimator", [KMeans, MiniBatchKMeans])
def test_errors_name_the_argument(estimator, parameters, x, message):
    with pytest.raises(InputError, match=message):
        estimator(**{"n_clusters": 2, **parameters}).fit(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", [KMeans, MiniBatchKMeans])
def test_unsound_tokens_are_refused_by_row_and_nothing_has_changed(estimator, value, dtype):
    sound = clusters(3, 60, 3).to(dtype)
    unsound = sound.clone()
    unsound[41, 2] = value
    unsound[57, 0] = value
    before = estimator(3, random_state=0).fit(sound)
    state = contents(before)
    sources: list[Any] = [
        unsound,
        torch.stack([sound, unsound]),
        list(unsound.split(7)),
        Chunks(lambda: iter(unsound.split(13))),
    ]
    if dtype != torch.bfloat16:
        sources += [unsound.numpy(), unsound.tolist()]
    for source in sources:
        with pytest.raises(InputError, match="X holds NaN or infinite values, first in row 41$"):
            before.fit(source)
        assert contents(before) == state
    for ask in (before.predict, before.transform, before.score):
        with pytest.raises(InputError, match="X holds NaN or infinite values, first in row 41$"):
            ask(list(unsound.split(7)))
    assert contents(before) == state


@pytest.mark.parametrize("estimator", [KMeans, MiniBatchKMeans])
def test_a_refused_fit_changes_nothing(estimator):
    tokens = clusters(3, 60, 4)
    fitted = estimator(3, random_state=0).fit(tokens.numpy())
    state = contents(fitted)
    for wrong in (noise(2, 7), noise(5), [noise(8, 3), noise(8, 2)], Chunks(lambda: iter([])), "tokens", 3):
        with pytest.raises(ValueError):
            fitted.fit(wrong)
        assert contents(fitted) == state
    with pytest.raises(InputError, match=r"X must be \['T', 4\], as it was when fitted, got \[1, 5, 3\]"):
        fitted.predict(noise(5, 3))
    with pytest.raises(ValueError, match="X has 3 features, but .* is expecting 4 features"):
        fitted.predict(noise(5, 3).numpy())
    with pytest.raises(InputError, match=r"X must be \['T', 4\], as it was when fitted, got \[2, 5, 4\]"):
        fitted.predict(noise(2, 5, 4))


# --- Memory ------------------------------------------------------------------------------------------------------

PEAK = """
    import resource, sys, warnings
    import torch
    from spt_fast.clustering import KMeans, MiniBatchKMeans

    class Chunks:
        def __init__(self, count):
            self.count = count
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            for _ in range(self.count):
                yield torch.randn(2, 1000, 64, generator=generator)

    warnings.simplefilter("ignore")
    for count in (20, 200):
        if sys.argv[1] == "KMeans":
            KMeans(4, random_state=0, max_iter=2).fit(Chunks(count))
        else:
            estimator = MiniBatchKMeans(4, random_state=0)
            for chunk in Chunks(count):
                estimator.partial_fit(chunk)
            estimator.finish()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["KMeans", "MiniBatchKMeans"])
def test_ten_times_more_tokens_take_no_more_memory(estimator):
    # 100 MB of tokens, where 10 MB have been before.
    command = [sys.executable, "-c", textwrap.dedent(PEAK), estimator]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after < 1.05 * before


def test_looking_for_nan_copies_no_more_than_a_piece(monkeypatch):
    from spt_fast.clustering import sources

    monkeypatch.setattr(sources, "ENTRIES", 100)
    sizes = []
    isfinite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda x: sizes.append(x.numel()) or isfinite(x))
    tokens = noise(2, 500, 5)
    assert sources.first_unsound(tokens) == -1 and max(sizes) == 1
    tokens[1, 333, 2] = float("nan")
    assert sources.first_unsound(tokens) == 333 and max(sizes) <= 100
