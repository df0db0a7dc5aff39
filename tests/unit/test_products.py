"""Generated products of one row: the same numbers, no call of the library, and nothing else is touched."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")

from kvbench.engines.inductor import generated_products  # noqa: E402
from kvbench.errors import InputError  # noqa: E402
from kvbench.strategies import get, graph, variants  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402


def rewritten(function, *inputs):
    """The graph of a function as the compiler would hand it to the pass, and after the pass."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    generated_products()(module.graph)
    module.graph.lint()
    module.recompile()
    return module, [node.target for node in module.graph.nodes]


def test_a_row_times_weights_becomes_a_multiplication_and_a_sum():
    row, weights = torch.randn(1, 64), torch.randn(96, 64)
    module, called = rewritten(lambda x, w: torch.nn.functional.linear(x, w), row, weights)
    assert torch.ops.aten.mm.default not in called
    assert torch.ops.aten.sum.dim_IntList in called
    torch.testing.assert_close(module(row, weights), row @ weights.T)


def test_a_bias_is_added():
    row, weights, bias = torch.randn(1, 64), torch.randn(96, 64), torch.randn(96)
    module, called = rewritten(torch.nn.functional.linear, row, weights, bias)
    assert torch.ops.aten.addmm.default not in called
    torch.testing.assert_close(module(row, weights, bias), row @ weights.T + bias)


@pytest.mark.parametrize(
    ("rows", "product"),
    [
        (2, lambda x, w: x @ w.T),
        # Weights that lie the other way, as GPT-2's do, are read along their columns.
        (1, lambda x, w: x @ w.reshape(64, 96)),
    ],
)
def test_other_products_stay(rows, product):
    _, called = rewritten(product, torch.randn(rows, 64), torch.randn(96, 64))
    assert torch.ops.aten.mm.default in called


def test_the_pass_is_known_by_its_text_and_equal_to_its_like():
    assert generated_products() == type(generated_products())()
    assert len(generated_products().uuid()) == 64


def test_it_is_an_option_of_the_compiled_static_cache_on_a_processor():
    strategy = get("static_compiled-generated")
    assert (strategy.products, strategy.id) == ("generated", "static_compiled-generated")
    assert "needs a cpu device" in strategy.available(None, "cuda")
    assert get("static_compiled").id == "static_compiled"
    with pytest.raises(InputError, match="library or generated"):
        variants({"name": "static_compiled", "products": "fast"}, "here")


def test_on_a_gpu_the_captured_step_takes_them_with_the_settings_that_its_torch_has():
    assert graph._settings("cpu").keys() == {"post_grad_custom_pre_pass"}
    known = torch._inductor.config.get_config_copy()
    tried = graph._settings("cuda").keys() - {"post_grad_custom_pre_pass"}
    assert tried == graph._TRIED.keys() & known.keys()
    # The library's compiler takes them all by these names.
    torch.compile(lambda x: x, options=graph._settings("cuda"))


def test_a_setting_that_this_torch_lacks_is_left_out(monkeypatch):
    monkeypatch.setitem(graph._TRIED, "triton.not_there_yet", True)
    assert "triton.not_there_yet" not in graph._settings("cuda")


def test_the_generated_step_is_an_option_of_the_captured_one():
    strategy = get("static_graph-generated")
    assert (strategy.kernels, strategy.id) == ("generated", "static_graph-generated")
    assert "needs a cuda device" in strategy.available(None, "cpu")
    assert get("static_graph").kernels == "library"


def test_the_generated_step_needs_triton(monkeypatch):
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in get("static_graph-generated").available(None, "cuda")
    assert get("static_graph").available(None, "cuda") is None


@pytest.mark.skipif(not shutil.which("g++"), reason="generated code is compiled with g++")
def test_the_generated_step_gives_the_tokens_of_the_library(tiny):
    def tokens(generated):
        session = graph.StaticLoopSession(tiny, 60, capture=False, generated=generated)
        return session.generate(range(300, 320), 12, lambda: None).tokens

    assert tokens(generated=True) == tokens(generated=False)
