import pytest

torch = pytest.importorskip("torch")

from mambench.harness.instruments import tensor_sizes  # noqa: E402


def test_a_storage_counts_once_under_its_first_name() -> None:
    x = torch.zeros(256)
    census = tensor_sizes.Census()
    census.add("input", tensor_sizes.named({"x": x, "n": 3, "same": x[:10]}))
    census.add("output", tensor_sizes.numbered("output", (x.view(16, 16), torch.zeros(64), None)))
    assert (census.total("input"), census.total("output")) == (1024, 256)
    assert census.total("saved") is None
    first, second = census.largest(peak_bytes=4096)
    assert (first["kind"], first["name"], first["share"]) == ("input", "x", 0.25)
    assert (second["name"], second["shape"], second["dtype"]) == ("output_1", [64], "float32")


def test_the_largest_are_few() -> None:
    census = tensor_sizes.Census()
    tensors = [torch.zeros(n) for n in range(1, 20)]
    census.add("saved", tensor_sizes.numbered("saved", tensors))
    found = census.largest(None)
    assert [row["bytes"] for row in found] == [4 * n for n in range(19, 11, -1)]
    assert found[0]["share"] is None


def test_what_autograd_saves_is_seen() -> None:
    x = torch.randn(128, requires_grad=True)
    saved, result = tensor_sizes.saved_by(lambda: (x.exp() * 2).sum())
    census = tensor_sizes.Census()
    census.add("input", [("x", x)])
    census.add("saved", tensor_sizes.numbered("saved", saved))
    assert census.total("saved") == 512  # exp keeps its result; the product by a number, nothing
    assert result.requires_grad
