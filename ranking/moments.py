"""Running moments of batch norm, brought together over ranks wherever the model is looked at."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ranking.averaging import DenseAverage


@torch.no_grad()
def agree_on_moments(module: nn.Module) -> None:
    """Give all ranks the moments of the rows of all of them; every rank must call it.

    A rank normalises training batches with moments of its own, so its running ones drift from the
    others'. Validation would then score one model a rank, and a checkpoint hold the first one's.
    The averages of moments (`ranking.averaging`) are part of it. Changes nothing where the ranks
    agree already.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    means = [_running(norm.running_mean) for norm in norms]
    variances = [_running(norm.running_var) for norm in norms]
    for average in (m for m in module.modules() if isinstance(m, DenseAverage)):
        average_means, average_variances = average.moments()
        means += average_means
        variances += average_variances
    own_X = torch.cat(means).double()
    mean_X = _mean_over_ranks(own_X)
    # Variance of the mixture: the mean of the variances and the variance of the means.
    variance_X = _mean_over_ranks(torch.cat(variances).double() + (own_X - mean_X).square())
    sizes = [len(mean) for mean in means]
    for mean, variance, new_mean, new_variance in zip(
        means, variances, mean_X.split(sizes), variance_X.split(sizes), strict=True
    ):
        mean.copy_(new_mean)
        variance.copy_(new_variance)


def _running(moment: Tensor | None) -> Tensor:
    assert moment is not None
    return moment


def _mean_over_ranks(values_X: Tensor) -> Tensor:
    total_X = values_X.clone()
    dist.all_reduce(total_X)
    return total_X / dist.get_world_size()
