"""Products of one row with weights as generated loops: a pass over the graph of a decoding step.

For one row a product is nothing but reading the weights. The libraries that torch calls for it are made for
many rows and leave a good part of the memory's rate unused; a loop that torch.compile generates from a
multiplication and a sum does not.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch._inductor.custom_graph_pass import CustomGraphPass


@cache
def generated_products() -> CustomGraphPass:
    """The pass, for the compiler's option ``post_grad_custom_pre_pass``; torch is imported only here."""
    import torch
    from torch._inductor import test_operators  # noqa: F401  (registers the operator that is used below)
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class GeneratedProducts(CustomGraphPass):
        """Replace ``row @ weights.T`` by ``(weights * row).sum(1)`` wherever a row stands alone."""

        def __call__(self, graph: torch.fx.Graph) -> None:
            """Rewrite one graph in place."""
            aten = torch.ops.aten
            for node in list(graph.nodes):
                if node.target is aten.mm.default:
                    row, columns = node.args
                    bias = None
                elif node.target is aten.addmm.default and not node.kwargs:
                    bias, row, columns = node.args
                else:
                    continue
                weights = _transposed(columns)
                if weights is None or row.meta["val"].shape[0] != 1:
                    continue
                with graph.inserting_before(node):
                    # Without this the loop over the weights would compute the row for each of its rows.
                    stored = graph.call_function(torch.ops._inductor_test.realize.default, (row,))
                    terms = graph.call_function(aten.mul.Tensor, (weights, stored))
                    sums = graph.call_function(aten.sum.dim_IntList, (terms, [1]))
                    result = graph.call_function(aten.unsqueeze.default, (sums, 0))
                    if bias is not None:
                        result = graph.call_function(aten.add.Tensor, (result, bias))
                with_values = ((stored, row), (result, node))
                for new, old in with_values:
                    new.meta.update(old.meta)
                terms.meta["val"] = weights.meta["val"] * stored.meta["val"]
                sums.meta["val"] = result.meta["val"][0]
                node.replace_all_uses_with(result)
                graph.erase_node(node)

        def uuid(self) -> str:
            """What the compiler's cache knows the pass by: the text of this file."""
            return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

        def __eq__(self, other: object) -> bool:
            """One pass is as good as another: the library compiles anew for settings that differ."""
            return isinstance(other, GeneratedProducts)

        def __hash__(self) -> int:
            """Equal for equals."""
            return hash(GeneratedProducts)

    return GeneratedProducts()


def _transposed(node: torch.fx.Node) -> torch.fx.Node | None:
    """The matrix that a node is the transpose of, if its rows lie one after the other in memory."""
    import torch

    aten = torch.ops.aten
    swapped = node.target is aten.t.default or (
        node.target is aten.permute.default and list(node.args[1]) == [1, 0]
    )
    if not swapped or not node.args[0].meta["val"].is_contiguous():
        return None
    return node.args[0]
