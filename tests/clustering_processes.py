"""What each of three processes does.

One, two and then three of them cluster, each its share of the tokens, in many ways, and write what came out to
FOLDER/{processes}_{rank}.pt; the test judges. Called in one process, :func:`outcomes` does the same with all shares
together.
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from token_samples import clusters
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from spt_fast.clustering import KMeans, MiniBatchKMeans
from spt_fast.errors import InputError

TOKENS = 3000
SHARES = [[3000], [2161, 839], [1801, 0, 1199]]  # of one process, of two and of three
BATCH = 400
Estimator = KMeans | MiniBatchKMeans


class Chunks:
    """Chunks of 170 tokens, made anew at each pass; none at all if there are no tokens."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tokens.split(170, dim=-2) if self.tokens.shape[-2] else [])


def learned(estimator: Estimator) -> dict[str, Tensor]:
    names = ("cluster_centers_", "counts_", "inertia_")
    return {name: torch.as_tensor(getattr(estimator, name)) for name in names}


def refused(act: Callable[[], Any]) -> str:
    """The error that ``act`` ends with."""
    try:
        act()
    except InputError as error:
        return str(error)
    return "nothing was refused"


def outcomes(shares: list[int], rank: int | None) -> dict[str, Any]:
    """What comes of clustering the share of one process; of all shares together if ``rank`` is ``None``."""
    results: dict[str, Any] = {}
    tokens = clusters(4, TOKENS, 6, spread=2.0)

    def own(whole: Tensor, dim: int = -2) -> Tensor:
        return whole if rank is None else whole.split(shares, dim=dim)[rank]

    def keep(name: str, estimator: Estimator) -> None:
        results[name] = learned(estimator)

    # Exact k-means. With K=2 there are more tokens than the seeds are drawn from.
    share, layers = own(tokens), own(torch.stack([tokens, tokens * 3 + 100, tokens.flip(0)]))
    fitted = KMeans(2, random_state=0).fit(share)
    keep("in memory", fitted)
    results["labels"] = fitted.labels_
    results["score"] = fitted.score(share)
    keep("numpy", KMeans(2, random_state=0).fit(share.numpy()))
    keep("bfloat16", KMeans(4, random_state=0).fit(share.bfloat16()))
    keep("chunks", KMeans(2, random_state=0, n_init=2).fit(Chunks(share)))
    keep("random start", KMeans(3, init="random", random_state=1).fit(Chunks(share)))
    keep("layers", KMeans(2, random_state=0).fit(layers))
    keep("chunks of layers", KMeans(2, random_state=0).fit(Chunks(layers)))
    far = tokens[:5].clone()
    far[1:4] = 1e4
    keep("empty clusters", KMeans(5, init=far).fit(share))
    keep("empty clusters in chunks", KMeans(5, init=far).fit(Chunks(share)))
    few = torch.tensor([[0.0, 1.0], [5.0, 5.0]]).repeat(TOKENS // 2, 1)
    keep("fewer distinct tokens than clusters", KMeans(3, random_state=0).fit(own(few)))
    weights = own(torch.arange(TOKENS) % 4 + 0.5, dim=-1)
    # A process without tokens passes no weights; it need not know that others do.
    weight = weights if len(weights) else None
    keep("weights", KMeans(2, random_state=0).fit(share, sample_weight=weight))
    if rank is not None:
        keep("no seed", KMeans(3).fit(share))

    # Interrupted after two passes, and taken up.
    begun, resumed = (KMeans(4, random_state=0, tol=0.0) for _ in range(2))
    for passes in begun.fit_passes(Chunks(share)):
        if passes == 2:
            resumed.load_state_dict(begun.state_dict())
            break
    for _ in resumed.fit_passes(Chunks(share), resume=True):
        pass
    keep("resumed", resumed)
    keep("not interrupted", KMeans(4, random_state=0, tol=0.0).fit(Chunks(share)))

    # Mini-batch k-means: a batch is what all processes pass to the same call.
    parts = own(torch.arange(TOKENS), dim=-1) if rank is None else torch.arange(TOKENS).split(shares)[rank]
    sizes = [max(1, size // 7) for size in shares]
    batches = [
        torch.cat([piece[:size] for piece, size in zip(_rest(shares, sizes, step), sizes, strict=True)])
        if rank is None
        else _rest(shares, sizes, step)[rank][: sizes[rank]]
        for step in range(8)
    ]
    assert sum(map(len, batches)) == len(parts)
    for name, given, whole in (("stream", False, tokens), ("weighted stream", True, tokens)):
        stream = MiniBatchKMeans(2, random_state=0, init_size=1000)
        for batch in batches:
            if not len(batch):
                stream.partial_fit(None)
            elif given:
                stream.partial_fit(whole[batch], sample_weight=batch % 4 + 0.5)
            else:
                stream.partial_fit(whole[batch])
        keep(name, stream)
        micro = stream.micro_clusters_
        results[f"{name}, sample"] = micro.sample
        results[f"{name}, micro-clusters"] = micro.cluster(2, random_state=0)._asdict()
    if rank is not None:
        stream = MiniBatchKMeans(2, init_size=1000)
        for batch in batches:
            stream.partial_fit(tokens[batch])
        keep("stream without seed", stream)

    # fit: the first BATCH tokens of each process, the next BATCH, and so on.
    cut = [whole.split(BATCH) for whole in tokens.split(shares)]
    union = [torch.cat([one[step] for one in cut if step < len(one)]) for step in range(max(map(len, cut)))]
    for name, mine in (("mini-batches", share), ("mini-batches of chunks", [share.split(2 * BATCH)][0])):
        estimator = MiniBatchKMeans(
            2, random_state=0, init_size=1000, batch_size=TOKENS if rank is None else BATCH
        )
        keep(name, estimator.fit(union if rank is None else mine))
        results[f"{name}, steps"] = estimator.n_steps_

    # What is refused is refused everywhere.
    if rank is not None:
        last = rank == len(shares) - 1
        bad = share.clone()
        if last:
            bad[5, 2] = float("nan")
        fitted, before = KMeans(2, random_state=0).fit(share), learned(KMeans(2, random_state=0).fit(share))
        results["refused"] = {
            "in memory": refused(lambda: fitted.fit(bad)),
            "chunks": refused(lambda: KMeans(2).fit(Chunks(bad))),
            "mini-batches": refused(lambda: MiniBatchKMeans(2, batch_size=3).fit(bad)),
            "stream": refused(lambda: MiniBatchKMeans(2).partial_fit(bad)),
            "too few": refused(lambda: KMeans(TOKENS + 1).fit(share)),
            "features": refused(lambda: KMeans(2).fit(share[:, : 6 - last])),
            "features of a batch": refused(lambda: MiniBatchKMeans(2).partial_fit(share[:, : 6 - last])),
            "no tokens": refused(lambda: KMeans(2).fit(share[:0, :0])),
            "no batch": refused(lambda: MiniBatchKMeans(2).partial_fit(None)),
        }
        results["kept"] = all(torch.equal(value, before[name]) for name, value in learned(fitted).items())
    return results


def _rest(shares: list[int], sizes: list[int], step: int) -> list[Tensor]:
    """Which tokens each process has left before a step of a stream."""
    return [
        piece[step * size :] for piece, size in zip(torch.arange(TOKENS).split(shares), sizes, strict=True)
    ]


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    store, rank, _ = next(rendezvous("env://"))
    for shares in SHARES:
        size = len(shares)
        if rank < size:
            dist.init_process_group(
                "gloo", store=dist.PrefixStore(f"{size}", store), rank=rank, world_size=size
            )
            torch.save(outcomes(shares, rank), folder / f"{size}_{rank}.pt")
            dist.destroy_process_group()
