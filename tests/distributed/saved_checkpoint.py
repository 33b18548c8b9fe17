"""A checkpoint begun and published in one call."""

from limbeck.distributed import begin_saving


def save_checkpoint(folder, step, distiller, optimizers, facts, world):
    return begin_saving(folder, step, distiller, optimizers, facts, world).finish()
