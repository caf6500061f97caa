"""Batched reciprocal merging as CUDA kernels, written in Triton.

The algorithm is that of `_torch.py`; what differs is where its state lives. A cluster is its first token everywhere,
so that nothing moves in memory when clusters disappear: only the lists of them shrink. A round is three launches:

    search   stale clusters look for their nearest neighbours, a tile of distances at a time
    pair     one program per item joins reciprocal neighbours, records that, and renews the lists
    merge    the data of the pairs is joined

How many rounds there are depends on the data and is known to the device alone. So a fixed number of them is launched,
which return at once where nothing is left to do, and a last launch does what remains, one program per item.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from atc_diffusion.clustering._clusters import MATRIX_FREE, pairwise_distances, prepare
from atc_diffusion.clustering.tree import ClusterTree

# Pictures of 4096 tokens take 7-11 rounds with average and complete linkage, the last of them with some dozens of
# clusters, which one program per item does as well. An idle round costs microseconds.
ROUNDS = 10
ALONE = 256  # tokens of the problems, windows above all, that one program does from the first round to the last

TILE = 128  # clusters by clusters whose distances are computed together
PROGRAMS = 16  # at most so many by so many an item: enough to fill a GPU, few enough to cost little when idle
BLOCK = 4096  # clusters that the program of an item looks at together

DEPTH = tl.constexpr(16)  # channels per step of a product; 32 spill registers on Ampere
MERGE_ROWS = tl.constexpr(16)  # pairs joined together,
MERGE_COLUMNS = tl.constexpr(128)  # in so many channels, or distances to clusters, at a time

# Rows of `links` [B, LINKS, N], int32, indexed by token unless they are lists.
NEIGHBOUR = tl.constexpr(0)
PARENT = tl.constexpr(1)
ROUND_ABSORBED = tl.constexpr(2)
PAIRS = tl.constexpr(3)  # a list, as long as `counts` says, of the clusters that have just absorbed their neighbour
ACTIVE = tl.constexpr(4)  # the list of all, in two rows for even and odd rounds; see `_clusters`
LINKS = tl.constexpr(6)

# Rows of `numbers` [B, NUMBERS, N], float32, indexed by token.
BOUND = tl.constexpr(0)  # distance to the nearest neighbour
FORMED = tl.constexpr(1)  # height at which the cluster came to be
HEIGHT = tl.constexpr(2)  # height at which it was absorbed
SIZE = tl.constexpr(3)
NORM = tl.constexpr(4)  # squared, of the mean
NUMBERS = tl.constexpr(5)

# Entries of `counts` [B, COUNTS], int32.
NUM_ACTIVE = tl.constexpr(0)
NUM_STALE = tl.constexpr(1)  # active clusters whose nearest neighbour is not known
NUM_PAIRS = tl.constexpr(2)
ROUND = tl.constexpr(3)
NUM_RECORDED = tl.constexpr(4)  # merges, of all rounds
LAST = tl.constexpr(5)  # a height, as an integer of `_ordered`, that no merge has to reach
COUNTS = tl.constexpr(6)

INFINITY = tl.constexpr(float("inf"))
NOBODY = tl.constexpr(0x7F800000 << 32)  # `_key` of an infinite distance and 0: a cluster's own neighbour is itself
LAST_KEY = tl.constexpr(2**63 - 1)
LAST_TOKEN = tl.constexpr(2**31 - 1)


def build_tree(tokens: Tensor, num_clusters: int, linkage: str, metric: str, together: int = 1) -> ClusterTree:
    """Cluster float32 `tokens` `[B, N, C]` (`[B, N, N]` if precomputed), every `together` items to `num_clusters`.

    Nothing is read back from the device and no shape depends on data, so a CUDA graph can capture it all.
    A product of two tokens is rounded to about 2^-20 of the product of their norms on tensor cores, to float32
    elsewhere. Distances that differ by less may be taken in another order than by the reference, always the same.
    """
    tokens = prepare(tokens, metric)
    means = (linkage, metric) in MATRIX_FREE
    data = (tokens if means else pairwise_distances(tokens, metric)).contiguous()
    links, numbers, counts = _initial_state(data)
    if means:
        numbers[:, NORM.value] = data.square().sum(dim=2)
    form, num_merges = f"{linkage} means" if means else linkage, together * tokens.shape[1] - num_clusters
    _run(data, links, numbers, counts, form, num_merges, together)
    parents, rounds, heights = links[:, PARENT.value], links[:, ROUND_ABSORBED.value], numbers[:, HEIGHT.value]
    heights = heights.mul(2).sqrt() if means and linkage == "ward" else heights.clone()
    return ClusterTree.from_merges(parents.long(), heights, rounds, num_clusters)


def _initial_state(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Links, numbers and counts where every token is an active and stale cluster of its own."""
    batch, num_tokens = data.shape[:2]
    links = torch.arange(num_tokens, dtype=torch.int32, device=data.device).repeat(batch, LINKS.value, 1)
    numbers = data.new_full((batch, NUMBERS.value, num_tokens), float("inf"))
    numbers[:, FORMED.value] = -float("inf")
    numbers[:, SIZE.value] = 1
    counts = links.new_zeros(batch, COUNTS.value)
    counts[:, : NUM_PAIRS.value] = num_tokens
    counts[:, LAST.value] = NOBODY.value >> 32
    return links, numbers, counts


def _run(
    data: Tensor, links: Tensor, numbers: Tensor, counts: Tensor, form: str, num_merges: int, together: int = 1
) -> None:
    """Launch rounds until no distance is left up to the `num_merges`-th smallest height of any `together` items."""
    batch, num_tokens, width = data.shape
    keys = links.new_full((batch, num_tokens), NOBODY.value, dtype=torch.int64)
    arguments = (data, links, numbers, counts, keys, num_tokens, width, num_merges, together)
    means = form.endswith("means")
    tile = min(TILE if means else TILE // 2, max(16, triton.next_power_of_2(num_tokens) // 4))
    options = {
        "FORM": form,
        "TILE": tile,
        "BLOCK": min(BLOCK, max(16, triton.next_power_of_2(num_tokens))),
        "PRECISION": precision(data.device),
        "enable_fp_fusion": True,
    }
    programs = min(PROGRAMS, triton.cdiv(num_tokens, tile))
    search_grid = (batch, programs, programs)
    merge_grid = (batch, triton.cdiv(num_tokens, 2 * MERGE_ROWS.value), 1) if means else search_grid
    with torch.cuda.device_of(data):
        for _ in range(min(ROUNDS, num_merges) if num_tokens > ALONE else 0):
            kernel[search_grid](*arguments, STEP="search", **options, num_warps=8)
            kernel[batch, 1, 1](*arguments, STEP="pair", **options, num_warps=16)
            kernel[merge_grid](*arguments, STEP="merge", **options, num_warps=8)
        if num_merges:
            kernel[batch, 1, 1](*arguments, STEP="all", **options, num_warps=8)


def precision(device: torch.device) -> str:
    """Three TF32 products stand for one in float32 where tensor cores multiply such, which is much faster."""
    has_tf32 = device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32x3" if has_tf32 else "ieee"


@triton.jit(do_not_specialize=["num_merges", "together"])
def kernel(
    data,
    links,
    numbers,
    counts,
    keys,
    n,
    width,
    num_merges,
    together,
    STEP: tl.constexpr,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of a round, or all rounds that are left; `data` [B, N, width] holds means or distances."""
    item = tl.program_id(0).to(tl.int64)
    data += item * n * width
    links += item * n * LINKS
    numbers += item * n * NUMBERS
    counts += item * COUNTS
    keys += item * n
    if STEP == "search":
        if (together > 1) & (tl.program_id(1) + tl.program_id(2) == 0):
            _find_last(numbers, counts, n, num_merges, together, BLOCK)
        _search(data, links, numbers, counts, keys, n, width, FORM, TILE, PRECISION)
    elif STEP == "pair":
        _pair(links, numbers, counts, keys, n, num_merges, BLOCK)
    elif STEP == "merge":
        _merge(data, links, numbers, counts, n, width, FORM)
    else:
        while tl.load(counts + NUM_ACTIVE) > 0:
            _search(data, links, numbers, counts, keys, n, width, FORM, TILE, PRECISION)
            tl.debug_barrier()
            _pair(links, numbers, counts, keys, n, num_merges, BLOCK)
            tl.debug_barrier()
            _merge(data, links, numbers, counts, n, width, FORM)
            tl.debug_barrier()


@triton.jit
def _clusters(links, counts, start, length, n, SIZE: tl.constexpr):
    """`SIZE` of the first `length` active clusters, from `start` on, and which of them there are.

    The stale ones are first: they lie at the front of the list, the others at its end.
    """
    slots = start + tl.arange(0, SIZE)
    places = tl.where(slots < tl.load(counts + NUM_STALE), slots, slots + n - tl.load(counts + NUM_ACTIVE))
    clusters = links + n * (ACTIVE + tl.load(counts + ROUND) % 2) + places
    return tl.load(clusters, mask=slots < length, other=0), slots < length


@triton.jit
def _search(
    data, links, numbers, counts, keys, n, width, FORM: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
):
    """Leave in `keys` how far the nearest neighbours of the stale clusters are, and which."""
    num_active = tl.load(counts + NUM_ACTIVE)
    num_stale = tl.load(counts + NUM_STALE)
    for first_row in range(tl.program_id(1) * TILE, num_stale, tl.num_programs(1) * TILE):
        rows, is_row = _clusters(links, counts, first_row, num_stale, n, TILE)
        nearest = tl.full([TILE], NOBODY, tl.int64)
        # Of two tiles that are each other's mirror image, only that above the diagonal is looked at, in both ways.
        for first_column in range(first_row + tl.program_id(2) * TILE, num_active, tl.num_programs(2) * TILE):
            columns, is_column = _clusters(links, counts, first_column, num_active, n, TILE)
            distances = _distances(data, numbers, rows, columns, n, width, FORM, TILE, PRECISION)
            apart = rows[:, None] ^ columns[None, :]
            distances = tl.where(is_row[:, None] & is_column[None, :] & (apart != 0), distances, INFINITY)
            nearest = tl.minimum(nearest, _nearest(distances, apart, 1))
            is_stale = first_column + tl.arange(0, TILE) < num_stale
            tl.atomic_min(keys + columns, _nearest(distances, apart, 0), mask=is_stale, sem="relaxed")
        tl.atomic_min(keys + rows, nearest, mask=is_row, sem="relaxed")


@triton.jit
def _distances(data, numbers, rows, columns, n, width, FORM: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """Distances [TILE, TILE] of clusters, or an increasing function of them."""
    if FORM == "average means":
        distances = tl.maximum(1 - _products(data, rows, columns, width, TILE, PRECISION), 0)
    elif FORM == "ward means":
        products = _products(data, rows, columns, width, TILE, PRECISION)  # first: the rest needs its registers too
        norms = tl.load(numbers + n * NORM + rows)[:, None] + tl.load(numbers + n * NORM + columns)[None, :]
        sizes = 1 / tl.load(numbers + n * SIZE + rows)[:, None] + 1 / tl.load(numbers + n * SIZE + columns)[None, :]
        distances = tl.maximum(norms - 2 * products, 0) / sizes
    else:
        distances = tl.load(data + rows.to(tl.int64)[:, None] * n + columns[None, :])
    return distances


@triton.jit
def _products(data, rows, columns, width, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """Products [TILE, TILE] of means."""
    rows = data + rows.to(tl.int64)[:, None] * width
    columns = data + columns.to(tl.int64)[None, :] * width
    products = tl.zeros([TILE, TILE], tl.float32)
    for first_channel in range(0, width, DEPTH):
        channels = first_channel + tl.arange(0, DEPTH)
        a = tl.load(rows + channels[None, :], mask=channels[None, :] < width, other=0)
        b = tl.load(columns + channels[:, None], mask=channels[:, None] < width, other=0)
        products = tl.dot(a, b, products, input_precision=PRECISION)
    return products


@triton.jit
def _nearest(distances, apart, AXIS: tl.constexpr):
    """Keys of the least distances along an axis, on ties to the cluster of the smallest row XOR column.

    That being symmetric, equal tokens pair off instead of all pointing at one.
    """
    nearest = tl.min(distances, axis=AXIS)
    tied = tl.where(distances == tl.expand_dims(nearest, AXIS), apart, LAST_TOKEN)
    return _key(nearest, tl.min(tied, axis=AXIS))


@triton.jit
def _key(distance, token):
    """Integers in the order of the distances, then of the tokens; a minimum of them is the same in any order."""
    return (_ordered(distance).to(tl.int64) << 32) | token.to(tl.int64)


@triton.jit
def _ordered(x):
    """The float32 as an integer that orders the same way; -0 counts as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(x):
    """The inverse of `_ordered`."""
    return (x ^ ((x >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _pair(links, numbers, counts, keys, n, num_merges, BLOCK: tl.constexpr):
    """Join the clusters that are each other's nearest neighbours, and drop those that need no further look."""
    if tl.load(counts + NUM_ACTIVE) > 0:
        _take_neighbours(links, numbers, counts, keys, n, BLOCK)
        tl.debug_barrier()
        _join_closest(links, numbers, counts, n, BLOCK)
        tl.debug_barrier()
        recorded = _record(links, numbers, counts, n, BLOCK)
        tl.debug_barrier()
        last = tl.full([1], 0, tl.int32) + tl.load(counts + LAST)
        if recorded >= num_merges:
            last = _kth_smallest(numbers + n * HEIGHT, num_merges, n, 1, BLOCK) + 1
        _renew(links, numbers, counts, _unordered(last), n, BLOCK)


@triton.jit
def _find_last(numbers, counts, n, num_merges, together, BLOCK: tl.constexpr):
    """Note the least height that no merge has to reach, given the merges so far of the items that are cut together.

    This is a part of the search, while which no program records merges.
    """
    before = tl.program_id(0) % together
    counts_of_all = counts - before * COUNTS
    recorded = 0
    for item in range(0, together):
        recorded += tl.load(counts_of_all + item * COUNTS + NUM_RECORDED)
    if recorded >= num_merges:
        heights = numbers - before.to(tl.int64) * n * NUMBERS + n * HEIGHT
        last = _kth_smallest(heights, num_merges, n, together, BLOCK) + 1
        tl.store(counts + LAST + tl.arange(0, 1), last)


@triton.jit
def _take_neighbours(links, numbers, counts, keys, n, BLOCK: tl.constexpr):
    """Read the keys that the search left, and clear them."""
    num_stale = tl.load(counts + NUM_STALE)
    for start in range(0, num_stale, BLOCK):
        clusters, valid = _clusters(links, counts, start, num_stale, n, BLOCK)
        key = tl.load(keys + clusters, mask=valid, other=0)
        tl.debug_barrier()  # here and below: several threads may hold one entry, and all must read before one writes
        tl.store(keys + clusters, tl.full([BLOCK], NOBODY, tl.int64), mask=valid)
        tl.store(links + n * NEIGHBOUR + clusters, clusters ^ key.to(tl.int32), mask=valid)
        tl.store(numbers + n * BOUND + clusters, _unordered((key >> 32).to(tl.int32)), mask=valid)


@triton.jit
def _join_closest(links, numbers, counts, n, BLOCK: tl.constexpr):
    """Make the closest pair reciprocal, since rounding can leave a ring of neighbours without a pair that is."""
    num_active = tl.load(counts + NUM_ACTIVE)
    closest = tl.full([BLOCK], LAST_KEY, tl.int64)
    for start in range(0, num_active, BLOCK):
        clusters, valid = _clusters(links, counts, start, num_active, n, BLOCK)
        key = _key(tl.load(numbers + n * BOUND + clusters), clusters)
        closest = tl.minimum(closest, tl.where(valid, key, LAST_KEY))
    cluster = tl.min(closest, axis=0).to(tl.int32)
    neighbour = tl.load(links + n * NEIGHBOUR + cluster)
    tl.store(links + n * NEIGHBOUR + neighbour, cluster)


@triton.jit
def _partners(links, clusters, n):
    """The nearest neighbours, and whether it is mutual."""
    partners = tl.load(links + n * NEIGHBOUR + clusters)
    return partners, (partners != clusters) & (tl.load(links + n * NEIGHBOUR + partners) == clusters)


@triton.jit
def _record(links, numbers, counts, n, BLOCK: tl.constexpr):
    """Note which clusters are absorbed, by which and at what height; heights never fall towards the root.

    Returns how many merges are recorded in all.
    """
    num_active = tl.load(counts + NUM_ACTIVE)
    number = tl.load(counts + ROUND)
    recorded = tl.load(counts + NUM_RECORDED)
    for start in range(0, num_active, BLOCK):
        clusters, valid = _clusters(links, counts, start, num_active, n, BLOCK)
        partners, paired = _partners(links, clusters, n)
        absorbed = valid & paired & (partners < clusters)
        distance = tl.minimum(tl.load(numbers + n * BOUND + clusters), tl.load(numbers + n * BOUND + partners))
        formed = tl.maximum(tl.load(numbers + n * FORMED + clusters), tl.load(numbers + n * FORMED + partners))
        tl.store(links + n * PARENT + clusters, partners, mask=absorbed)
        tl.store(links + n * ROUND_ABSORBED + clusters, tl.zeros([BLOCK], tl.int32) + number, mask=absorbed)
        tl.store(numbers + n * HEIGHT + clusters, tl.maximum(distance, formed), mask=absorbed)
        recorded += tl.sum(absorbed.to(tl.int32), axis=0)
    tl.debug_barrier()
    tl.store(counts + NUM_RECORDED, recorded)
    return recorded


@triton.jit
def _kth_smallest(values, k, n, together, BLOCK: tl.constexpr):
    """The `k`-th smallest number of a row of `together` items, as an integer of `_ordered`.

    It is found digit by digit: it is the greatest number that fewer than `k` values are below.
    """
    digits = tl.arange(0, 16)
    found = tl.full([1], -(2**31), tl.int32)
    for place in range(8):
        candidates = found + (digits << (28 - 4 * place))
        below = tl.zeros([16], tl.int32)
        row = values
        for _ in range(0, together):
            for start in range(0, n, BLOCK):
                slots = start + tl.arange(0, BLOCK)
                value = _ordered(tl.load(row + slots, mask=slots < n, other=INFINITY))
                below += tl.sum((value[:, None] < candidates[None, :]).to(tl.int32), axis=0)
            row += n * NUMBERS
        found += (tl.sum((below < k).to(tl.int32), axis=0) - 1) << (28 - 4 * place)
    return found


@triton.jit
def _renew(links, numbers, counts, last, n, BLOCK: tl.constexpr):
    """List the clusters that can still merge below the height `last`, and the new ones among them."""
    num_active = tl.load(counts + NUM_ACTIVE)
    number = tl.load(counts + ROUND)
    front = links + n * (ACTIVE + (number + 1) % 2)
    stale, settled, pairs = 0, 0, 0
    for start in range(0, num_active, BLOCK):
        clusters, valid = _clusters(links, counts, start, num_active, n, BLOCK)
        partners, paired = _partners(links, clusters, n)
        _, partner_paired = _partners(links, partners, n)
        is_new = valid & paired & (clusters < partners)
        size = tl.load(numbers + n * SIZE + clusters) + tl.load(numbers + n * SIZE + partners)
        height = tl.load(numbers + n * HEIGHT + partners)
        bound = tl.where(is_new, height, tl.load(numbers + n * BOUND + clusters))
        kept = valid & (is_new | ~paired) & (bound < last)
        partner_gone = partner_paired | (tl.load(numbers + n * BOUND + partners) >= last)
        tl.debug_barrier()
        tl.store(numbers + n * BOUND + clusters, height, mask=is_new)
        tl.store(numbers + n * FORMED + clusters, height, mask=is_new)
        tl.store(numbers + n * SIZE + clusters, size, mask=is_new)
        stale = _append(front, 1, stale, clusters, kept & partner_gone)
        settled = _append(front + n - 1, -1, settled, clusters, kept & ~partner_gone)
        pairs = _append(links + n * PAIRS, 1, pairs, clusters, kept & is_new)
    tl.debug_barrier()
    going = stale + settled > 1
    tl.store(counts + NUM_ACTIVE, tl.where(going, stale + settled, 0))
    tl.store(counts + NUM_STALE, tl.where(going, stale, 0))
    tl.store(counts + NUM_PAIRS, tl.where(going, pairs, 0))
    tl.store(counts + ROUND, number + 1)


@triton.jit
def _append(list, STEP: tl.constexpr, length, clusters, wanted):
    """Append those wanted to a list that grows by steps of 1 or -1; returns its new length."""
    count = wanted.to(tl.int32)
    tl.store(list + STEP * (length + tl.cumsum(count, axis=0) - 1), clusters, mask=wanted)
    return length + tl.sum(count, axis=0)


@triton.jit
def _merge(data, links, numbers, counts, n, width, FORM: tl.constexpr):
    """Join the data of the clusters in the list of pairs with that of their neighbours."""
    if FORM == "average means" or FORM == "ward means":
        _merge_means(data, links, numbers, counts, n, width)
    else:
        _merge_distances(data, links, numbers, counts, n, FORM)


@triton.jit
def _merge_means(data, links, numbers, counts, n, width):
    """Take a step towards the neighbour, not a sum: the mean of identical tokens stays that token to the bit."""
    num_pairs = tl.load(counts + NUM_PAIRS)
    for start in range(tl.program_id(1) * MERGE_ROWS, num_pairs, tl.num_programs(1) * MERGE_ROWS):
        slots = start + tl.arange(0, MERGE_ROWS)
        valid = slots < num_pairs
        clusters = tl.load(links + n * PAIRS + slots, mask=valid, other=0)
        partners = tl.load(links + n * NEIGHBOUR + clusters)
        step = tl.load(numbers + n * SIZE + partners) / tl.load(numbers + n * SIZE + clusters)
        norms = tl.zeros([MERGE_ROWS], tl.float32)
        for first_channel in range(0, width, MERGE_COLUMNS):
            channels = first_channel + tl.arange(0, MERGE_COLUMNS)[None, :]
            inside = valid[:, None] & (channels < width)
            targets = data + clusters.to(tl.int64)[:, None] * width + channels
            mean = tl.load(targets, mask=inside, other=0)
            other = tl.load(data + partners.to(tl.int64)[:, None] * width + channels, mask=inside, other=0)
            mean += (other - mean) * step[:, None]
            tl.debug_barrier()
            tl.store(targets, mean, mask=inside)
            norms += tl.sum(mean * mean, axis=1)
        tl.store(numbers + n * NORM + clusters, norms, mask=valid)


@triton.jit
def _merge_distances(data, links, numbers, counts, n, FORM: tl.constexpr):
    """Write the distances of every new cluster, row and column, in place.

    No two threads meet: the distance of two clusters is read only to compute that of the clusters they went into,
    which of two new clusters is done in the row of the first. So the matrix also stays symmetric to the bit.
    """
    num_active = tl.load(counts + NUM_ACTIVE)
    num_pairs = tl.load(counts + NUM_PAIRS)
    for first_row in range(tl.program_id(1) * MERGE_ROWS, num_pairs, tl.num_programs(1) * MERGE_ROWS):
        slots = first_row + tl.arange(0, MERGE_ROWS)
        is_row = slots < num_pairs
        rows = tl.load(links + n * PAIRS + slots, mask=is_row, other=0)
        partners = tl.load(links + n * NEIGHBOUR + rows)
        for first_column in range(tl.program_id(2) * MERGE_COLUMNS, num_active, tl.num_programs(2) * MERGE_COLUMNS):
            columns, is_column = _clusters(links, counts, first_column, num_active, n, MERGE_COLUMNS)
            column_partners, is_new = _partners(links, columns, n)
            inside = is_row[:, None] & is_column[None, :] & (rows[:, None] != columns[None, :])
            inside &= (rows[:, None] < columns[None, :]) | ~is_new[None, :]
            joined = _joined_distances(data, numbers, n, rows, partners, columns, column_partners, is_new, inside, FORM)
            tl.store(data + rows.to(tl.int64)[:, None] * n + columns[None, :], joined, mask=inside)
            mirrored = data + columns.to(tl.int64)[:, None] * n + rows[None, :]
            tl.store(mirrored, tl.trans(joined), mask=tl.trans(inside))


@triton.jit
def _joined_distances(data, numbers, n, a, b, c, d, is_new, inside, FORM: tl.constexpr):
    """Distances [rows, columns] of the unions of a and b from c or, where `is_new`, from the unions of c and d."""
    a, b, c, d, is_new = a[:, None], b[:, None], c[None, :], d[None, :], is_new[None, :]
    n_ab, n_b = tl.load(numbers + n * SIZE + a), tl.load(numbers + n * SIZE + b)
    n_cd, n_d = tl.load(numbers + n * SIZE + c), tl.where(is_new, tl.load(numbers + n * SIZE + d), 0)
    d_ab, d_cd = tl.load(numbers + n * FORMED + a), tl.where(is_new, tl.load(numbers + n * FORMED + c), 0)
    from_a, from_b = data + a.to(tl.int64) * n, data + b.to(tl.int64) * n
    d_ac, d_bc = tl.load(from_a + c, mask=inside, other=0), tl.load(from_b + c, mask=inside, other=0)
    d_ad = tl.load(from_a + d, mask=inside & is_new, other=0)
    d_bd = tl.load(from_b + d, mask=inside & is_new, other=0)
    to_c = _join(d_ac, d_bc, d_ab, n_ab - n_b, n_b, n_cd - n_d, FORM)
    to_d = _join(d_ad, d_bd, d_ab, n_ab - n_b, n_b, n_d, FORM)
    return tl.where(is_new, _join(to_c, to_d, d_cd, n_cd - n_d, n_d, n_ab, FORM), to_c)


@triton.jit
def _join(d_ki, d_kj, d_ij, n_i, n_j, n_k, LINKAGE: tl.constexpr):
    """How far a cluster k is from the union of i and j, as in `_clusters.py`."""
    if LINKAGE == "single":
        distance = tl.minimum(d_ki, d_kj)
    elif LINKAGE == "complete":
        distance = tl.maximum(d_ki, d_kj)
    elif LINKAGE == "average":
        distance = d_ki + (d_kj - d_ki) * (n_j / (n_i + n_j))
    else:
        squared = (n_i + n_k) * d_ki * d_ki + (n_j + n_k) * d_kj * d_kj - n_k * d_ij * d_ij
        distance = tl.sqrt_rn(tl.maximum(squared / (n_i + n_j + n_k), 0))
    return distance
