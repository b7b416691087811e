"""Steps whose result is the same, bit for bit, on any number of workers and threads.

Each batch is cut into a fixed number of shares, `train.num_shares`. A worker computes the loss and the gradients of its shares
one by one, each on a single thread, and they are added in a fixed tree over the shares, (0 + 1) + (2 + 3), whoever computed
them. Rows, augmentation and dropout of a share follow from (seed, epoch, step, share), never from a worker. A worker with
several threads works on as many shares at a time.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rcnn.data.augment import Augmentation
from rcnn.data.batches import Batch, Order, RowSource
from rcnn.model.dropout import Position, set_position
from rcnn.scores import Scores
from rcnn.train.checkpoint import TrainState
from rcnn.train.execution import Execution
from rcnn.train.step import loss_of, process_group, score, steps_drawn, update

Tensors = list[Tensor]


class SharedSteps:
    """The steps of a run, in shares.

    Args:
        state: what is trained.
        rows: the training rows, of all workers.
        augmentation: how images are changed.
        execution: how the steps run.

    Raises:
        DataError: there are fewer rows than one batch.
    """

    def __init__(self, state: TrainState, rows: RowSource, augmentation: Augmentation, execution: Execution):
        self.state, self.execution = state, execution
        self.batch_size, self.num_shares = state.config.train.batch_size, state.config.train.shares
        self.own = shares_of(self.num_shares, *process_group())
        self._loaders = {
            share: rows.loader(
                Order(self.batch_size, state.config.seed, share, self.num_shares), augmentation, execution.device
            )
            for share in self.own
        }
        self.num_steps = self._loaders[self.own[0]].num_steps
        self._lanes = _Lanes(state.model, self.own, execution)

    def epoch(self, epoch: int, *, first_step: int = 0) -> Iterator[Tensor]:
        """Makes the steps of an epoch after the first `first_step` of them; yields the mean loss of each batch."""
        batches = {share: loader.epoch(epoch, first_step=first_step) for share, loader in self._loaders.items()}
        self._lanes.train()
        for step in range(first_step + 1, self.num_steps + 1):
            yield self._step(batches, epoch, step)

    def mean_loss(self, loss: Tensor) -> float:
        """The loss as a number: each worker has that of whole batches."""
        return float(loss)

    def score(self, val: RowSource) -> Scores:
        """The scores of all workers' validation rows, also in shares: a loss is the same on any number of workers."""
        config, manifest = self.state.config, self.state.manifest

        def of_share(model: nn.Module, share: int) -> Tensors:
            scores = score(
                self.state.best_model,
                val.share(share, self.num_shares),
                num_classes=len(manifest.classes),
                batch_size=config.evaluate.batch_size,
                device=self.execution.device,
                precision=self.execution.precision,
            )
            return [scores.confusion.double(), scores.loss_sum]

        confusion, loss_sum = self._total(self._lanes.each(of_share))
        return Scores(confusion.long(), loss_sum)

    def _step(self, batches: Mapping[int, Iterator[Batch]], epoch: int, step: int) -> Tensor:
        parameters, statistics = list(self.state.model.parameters()), statistics_of(self.state.model)
        seed, precision = self.state.config.seed, self.execution.precision
        smoothing = self.state.config.train.label_smoothing

        def of_share(model: nn.Module, share: int) -> Tensors:
            position = Position(seed, epoch, step, share)
            set_position(model, position)
            self.execution.seed(position)
            own_statistics = statistics_of(model)
            for own, common in zip(own_statistics, statistics, strict=True):
                own.copy_(common)
            images_NCHW, labels_N = next(batches[share])
            with steps_drawn(model, self.state.config, position):
                loss = loss_of(model, images_NCHW, labels_N, precision, smoothing) * (len(labels_N) / self.batch_size)
                gradients = torch.autograd.grad(loss, list(model.parameters()))
            # In one layout: the norm of a gradient is summed in the order of memory.
            return [loss.detach(), *(each.contiguous() for each in gradients), *(own.clone() for own in own_statistics)]

        loss, *sums = self._total(self._lanes.each(of_share))
        for parameter, gradient in zip(parameters, sums, strict=False):
            parameter.grad = gradient
        for common, total in zip(statistics, sums[len(parameters) :], strict=True):
            common.copy_(total / self.num_shares)
        self._lanes.once(lambda: update(self.state.model, self.state.optimizer, self.state.config.train.clip_norm))
        return loss

    def _total(self, by_share: Mapping[int, Tensors]) -> Tensors:
        """The sums over all shares of all workers, added in the tree."""
        whole, (rank, num_ranks) = range(self.num_shares), process_group()
        found = {
            tree: _sum(tree, {range(share, share + 1): by_share[share] for share in tree}) for tree in self._trees(rank)
        }
        if num_ranks > 1:
            found = self._gathered(found, by_share[self.own[0]], num_ranks)
        return _sum(whole, found)

    def _trees(self, rank: int) -> list[range]:
        """The largest parts of the tree that a worker can add up by itself."""
        return subtrees(shares_of(self.num_shares, rank, process_group()[1]), range(self.num_shares))

    def _gathered(self, own: Mapping[range, Tensors], like: Tensors, num_ranks: int) -> dict[range, Tensors]:
        """The sums of all workers: each sends equally many numbers, zeros where it has fewer sums."""
        all_trees = [self._trees(rank) for rank in range(num_ranks)]
        sizes = [tensor.numel() for tensor in like]
        sent = like[0].new_zeros(max(map(len, all_trees)), sum(sizes))
        for line, sums in zip(sent, own.values(), strict=False):
            torch.cat([tensor.reshape(-1) for tensor in sums], out=line)
        received = [torch.empty_like(sent) for _ in range(num_ranks)]
        dist.all_gather(received, sent)
        return {
            tree: [part.view(tensor.shape) for part, tensor in zip(line.split(sizes), like, strict=True)]
            for trees, lines in zip(all_trees, received, strict=True)
            for tree, line in zip(trees, lines, strict=False)
        }


class _Lanes:
    """Where a worker's shares are computed, several at a time on a CPU: a thread each, with modules of its own that share the
    model's parameters."""

    def __init__(self, model: nn.Module, shares: range, execution: Execution):
        is_cpu = execution.device.type == "cpu"
        is_parallel = is_cpu and not execution.is_compiled  # a compiled network draws from the generator of the process
        num_lanes = min(torch.get_num_threads(), len(shares)) if is_parallel else 1
        self._shares = [shares[lane::num_lanes] for lane in range(num_lanes)]
        self._modules = [execution.compiled(with_same_parameters(model)) for _ in range(num_lanes)]
        self._pool = threads_of_one(num_lanes) if is_cpu else None

    def train(self) -> None:
        """Puts all modules in training mode."""
        for module in self._modules:
            module.train()

    def each(self, work: Callable[[nn.Module, int], Tensors]) -> dict[int, Tensors]:
        """The answers of `work`, called with a module and a share, by share."""

        def of_lane(number: int) -> dict[int, Tensors]:
            return {share: work(self._modules[number], share) for share in self._shares[number]}

        lanes = range(len(self._modules))
        answers: dict[int, Tensors] = {}
        for answer in self._pool.map(of_lane, lanes) if self._pool else map(of_lane, lanes):
            answers |= answer
        return answers

    def once(self, work: Callable[[], Any]) -> None:
        """Calls a function on a single thread: a sum over the parts of several threads depends on their number."""
        self._pool.submit(work).result() if self._pool else work()


def threads_of_one(num_threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch computes on one core. The caller keeps its number."""

    def start() -> None:
        torch.get_num_threads()  # when a thread first asks, torch gives it the number that was set last, whoever set it
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, "share", initializer=start)
    all_started = threading.Barrier(num_threads)
    list(pool.map(lambda _: all_started.wait(), range(num_threads)))
    torch.set_num_threads(before)
    return pool


def with_same_parameters(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters, but no buffer and no state of a module."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def statistics_of(model: nn.Module) -> Tensors:
    """The running means and variances of a model's batch normalisations."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]


def shares_of(num_shares: int, rank: int, num_ranks: int) -> range:
    """A worker's shares: neighbours, so that it can add up as much of the tree as possible."""
    return range(rank * num_shares // num_ranks, (rank + 1) * num_shares // num_ranks)


def subtrees(own: range, tree: range) -> list[range]:
    """The largest subtrees of `tree` whose shares are all in `own`."""
    if tree.start >= own.start and tree.stop <= own.stop:
        return [tree]
    if tree.stop <= own.start or tree.start >= own.stop:
        return []
    return [part for half in _halves(tree) for part in subtrees(own, half)]


def _halves(tree: range) -> Sequence[range]:
    middle = (tree.start + tree.stop) // 2
    return range(tree.start, middle), range(middle, tree.stop)


def _sum(tree: range, found: Mapping[range, Tensors]) -> Tensors:
    """The sum over a tree, from those of subtrees."""
    if tree in found:
        return found[tree]
    left, right = (_sum(half, found) for half in _halves(tree))
    return [one + other for one, other in zip(left, right, strict=True)]
