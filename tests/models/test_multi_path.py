import copy

import pytest
import torch
import torch.nn.functional as F

from rfield.models import MultiPathHead, ParsingNetwork, Paths, SinglePathHead, aspp_head, small_cnn_backbone
from rfield.receptive_field import theoretical_receptive_field
from rfield.search import learned_layers


def make(**options: object) -> MultiPathHead:
    torch.manual_seed(0)
    settings = {"dilation": 4, "head_channels": 8, "dropout": 0.0} | options
    return MultiPathHead(6, 5, **settings)


def same_weights(head: MultiPathHead) -> MultiPathHead:
    for path in head.paths[1:]:
        path.load_state_dict(head.paths[0].state_dict())
    return head


@pytest.mark.parametrize("mechanism", ["regulator", "dilation"])
def test_logits_are_the_sum_of_the_paths(mechanism: str) -> None:
    head = make(paths=3, mechanism=mechanism).eval()
    features = torch.randn(2, 6, 9, 7)
    expected = torch.stack([path(features, (33, 25)) for path in head.paths]).sum(0)
    assert torch.allclose(head(features, (33, 25)), expected, atol=1e-6)
    assert len(learned_layers(head)) == 3


def test_every_path_begins_with_batch_norm_and_has_its_own_weights() -> None:
    head = make()
    assert all(isinstance(path.chain()[0], torch.nn.BatchNorm2d) for path in head.paths)
    first, second = (path.layers.module.fc6.weight for path in head.paths)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_equal_paths_with_equal_class_sets_stay_identical(weight: float) -> None:
    head = same_weights(make(class_groups=[[1, 2], [1, 2]], gradient_weight=weight))
    start = copy.deepcopy(head.state_dict())
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(2, 6, 9, 7, generator=generator)
        mask = torch.randint(0, 5, (2, 9, 7), generator=generator)
        F.cross_entropy(head(features, mask=mask), mask).backward()
        optimizer.step()
        optimizer.zero_grad()
    one, two = (path.state_dict() for path in head.paths)
    for key in one:
        assert torch.equal(one[key], two[key]), key
    assert any(not torch.equal(start[key], value) for key, value in head.state_dict().items())
    assert float(head.paths[0].factor_layer.factor) != 1.0


def test_published_guidance_weighs_each_paths_gradient_at_its_own_classes() -> None:
    head = make(class_groups=[[0], [1, 2]], gradient_weight=5.0)
    features, mask = torch.randn(2, 6, 9, 7), torch.randint(0, 5, (2, 9, 7))
    seen = []
    for path in head.paths:
        path.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0]))
    logits = head(features, mask=mask)
    F.cross_entropy(logits, mask).backward()
    plain = logits.detach().requires_grad_()
    F.cross_entropy(plain, mask).backward()
    second, first = seen
    for grad, classes in ((first, [0]), (second, [1, 2])):
        weights = torch.where(torch.isin(mask, torch.tensor(classes)), 5.0, 1.0)[:, None]
        assert torch.allclose(grad, plain.grad * weights, atol=1e-7)


def test_receptive_field_is_that_of_the_path_that_sees_farthest() -> None:
    head = make(paths=2)
    head.paths[1].factor_layer.set_factor(0.5)
    network = ParsingNetwork(small_cnn_backbone(), MultiPathHead(32, 5, dilation=4, head_channels=8))
    network.head.paths[1].factor_layer.set_factor(0.5)
    assert theoretical_receptive_field(network) == pytest.approx((15 + 8 * 8, 15 + 8 * 8))
    assert head.effective_dilation == (8.0, 8.0)


def test_aspp_is_deeplabs() -> None:
    """Parallel fc6 of rates 6, 12, 18, 24, each with fc7 and fc8, summed; nothing is learned but the weights."""
    head = aspp_head(6, 5, head_channels=8).eval()
    assert [path.layers.fc6.dilation for path in head.paths] == [(6, 6), (12, 12), (18, 18), (24, 24)]
    assert not learned_layers(head)
    features = torch.randn(1, 6, 9, 7)
    expected = sum(path.layers(features) for path in head.paths)
    assert torch.allclose(head(features), expected, atol=1e-6)


def test_paths_builds_each_kind() -> None:
    sizes = (6, 5, 4, 8, 0.0, True, "dilation")
    assert isinstance(Paths().head(*sizes), SinglePathHead)
    assert len(Paths(3).head(*sizes).paths) == 3
    assert [path.dilation for path in Paths(rates=(2, 5)).head(*sizes).paths] == [2, 5]
    assert Paths(rectangular=True).head(*sizes).factor_layer.log_factor.numel() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 1}, "2 to 255"),
        ({"paths": 65536}, "2 to 255"),
        ({"dilation": [2, 3, 4]}, "2 paths need"),
        ({"fusion": "max"}, "fusion"),
        ({"class_groups": [[0]]}, "as many class groups"),
        ({"class_groups": [[0], []]}, "a class group holds"),
        ({"class_groups": [[0], [5]]}, "a class group holds"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
