"""Rows of tables that have one for each training image, by the views that rays belong to.

A view that is not trained on (held out, a frame of a video) has no row of its own. Rays say which view they
belong to (:attr:`utils.types.Rays.camera_indices`); -1 is none.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from utils.types import Scene


def row_of_view(scene: Scene) -> Int64[Tensor, " N_plus_1"]:
    """Row of each of N views in a table of T training images; T for views that are not trained on.

    The last entry is T, too: that of view -1. Three views of which the middle one is held out give
    (0, 2, 1, 2).
    """
    num_rows = len(scene.train_indices)
    rows = torch.full((len(scene.cameras) + 1,), num_rows)
    rows[list(scene.train_indices)] = torch.arange(num_rows)
    return rows


def rows_of(
    table: Float[Tensor, "T C"],
    otherwise: Float[Tensor, " C"],
    row_of_view: Int64[Tensor, " N_plus_1"],
    camera_indices: Int64[Tensor, " R"],
) -> Float[Tensor, "R C"]:
    """The table's rows of the rays' views, or what there is otherwise; differentiable in both."""
    rows = row_of_view.index_select(0, camera_indices.remainder(len(row_of_view)))
    return torch.cat([table, otherwise[None]]).index_select(0, rows)
