"""Signed distance and radiance fields: the sphere to start from, and what colours depend on."""

import math

import pytest
import torch
from helpers_triton import DEVICE, needs_triton
from torch import Tensor, nn

from encoder import HashGridConfig
from models.backends import Backends
from models.fields import RadianceConfig, RadianceField, ReLUNetwork, SDFConfig, SDFField

CPU = Backends.all("cpu")
GRID = HashGridConfig(num_levels=4, log2_table_size=10, base_resolution=8, max_resolution=64)


def in_ball(count: int) -> Tensor:
    directions = torch.nn.functional.normalize(torch.randn(count, 3), dim=1)
    return directions * torch.rand(count, 1) ** (1 / 3)


def on_sphere(count: int, radius: float) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 3), dim=1) * radius


@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
@pytest.mark.parametrize("radius", [0.3, 0.5, 0.8])
def test_untrained_network_is_a_sphere(hidden_layers: int, radius: float) -> None:
    field = SDFField(
        SDFConfig(GRID, hidden_layers=hidden_layers, hidden_width=256, initial_radius=radius), CPU
    )
    positions = in_ball(4000)
    distance = positions.norm(dim=1)
    outputs, gradient = field(positions, 4.0)
    # Further layers have finitely many random units: waves of a few / sqrt(width) of the distance are left.
    difference = (outputs[:, 0] - (distance - radius)) / distance.clamp(min=0.2)
    assert difference.abs().mean() < 2.4 * math.sqrt(hidden_layers / 256)
    length = gradient.norm(dim=1)
    assert length[distance > 0.1].mean().item() == pytest.approx(1.0, abs=0.3)
    outward = (gradient * positions).sum(dim=1) / (length * distance)
    assert outward[distance > 0.1].mean() > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_mean_over_the_sphere_is_zero_with_unit_slope(seed: int) -> None:
    torch.manual_seed(seed)
    field = SDFField(SDFConfig(GRID), CPU)
    directions = on_sphere(20000, 1.0)
    means = [field.sdf(directions * radius, 0.0).mean().item() for radius in (0.5, 0.6)]
    assert means[0] == pytest.approx(0.0, abs=0.001)
    assert means[1] - means[0] == pytest.approx(0.1, abs=0.001)


@pytest.mark.parametrize("seed", range(5))
def test_default_network_is_a_round_sphere(seed: int) -> None:
    torch.manual_seed(seed)
    field = SDFField(SDFConfig(GRID), CPU)
    positions = in_ball(4000)
    difference = (field.sdf(positions, 0.0) - (positions.norm(dim=1) - 0.5)).abs()
    assert difference.mean() < 0.01
    assert difference.max() < 0.05


def test_sign_says_inside_from_the_start() -> None:
    field = SDFField(SDFConfig(GRID), CPU)
    assert (field.sdf(on_sphere(500, 0.1), 4.0) < 0).all()
    assert (field.sdf(on_sphere(500, 1.0), 4.0) > 0).all()


def test_inside_out_is_the_same_sphere_with_the_other_sign() -> None:
    torch.manual_seed(0)
    plain = SDFField(SDFConfig(GRID, initial_radius=0.8), CPU)
    torch.manual_seed(0)
    turned = SDFField(SDFConfig(GRID, initial_radius=0.8, inside_out=True), CPU)
    positions = torch.rand(100, 3) - 0.5
    (outputs, gradient), (expected, expected_gradient) = (field(positions, 0.0) for field in (turned, plain))
    torch.testing.assert_close(outputs[:, 0], -expected[:, 0])
    torch.testing.assert_close(gradient, -expected_gradient)
    torch.testing.assert_close(outputs[:, 1:], expected[:, 1:])
    assert float(turned.sdf(torch.zeros(1, 3), 0.0)) > 0.5


def test_grid_does_not_disturb_the_sphere() -> None:
    field = SDFField(SDFConfig(GRID), CPU)
    positions = in_ball(500)
    torch.testing.assert_close(field.sdf(positions, 4.0), field.sdf(positions, 0.0), atol=1e-3, rtol=0)


def test_geometry_features_differ() -> None:
    field = SDFField(SDFConfig(GRID, feature_width=7), CPU)
    in_order = in_ball(500)
    outputs, gradient = field(in_order, 4.0)
    # The distance and seven features, then the encoding: the position and 2 features of each level.
    assert outputs.shape == (500, field.output_width)
    assert field.output_width == 8 + field.grid.width
    torch.testing.assert_close(outputs[:, 8:], field.grid(in_order, 4.0))
    outputs = outputs[:, :8]
    assert gradient.shape == (500, 3)
    correlation = torch.corrcoef(outputs.detach().t()) - torch.eye(8)
    assert correlation.abs().max() < 0.999


@pytest.mark.parametrize("hidden_layers", [1, 2])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=needs_triton)])
def test_versions_agree(backend: str, hidden_layers: int) -> None:
    device = DEVICE if backend == "cuda" else torch.device("cpu")
    fast = SDFField(SDFConfig(GRID, hidden_layers=hidden_layers), Backends.all(backend)).to(device)
    slow = SDFField(SDFConfig(GRID, hidden_layers=hidden_layers), Backends.all("reference"))
    slow.load_state_dict(fast.state_dict())
    positions = in_ball(200)
    there, count = positions.to(device), torch.tensor(150, device=device)
    for actual, expected in zip(fast(there, 4.0), slow(positions, 4.0), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, atol=2e-4, rtol=1e-3)
    expected = slow.sdf(positions, 2.5)
    active = torch.tensor(2.5, device=device)
    torch.testing.assert_close(fast.sdf(there, active).cpu(), expected, atol=1e-5, rtol=1e-5)
    # With padding at the end.
    padded = [*fast(there, active, count), fast.sdf(there, active, count)]
    for actual, whole in zip(padded, [*fast(there, active), fast.sdf(there, active)], strict=True):
        torch.testing.assert_close(actual[:150], whole[:150])
        assert not actual[150:].any()


def test_relu_network() -> None:
    network = ReLUNetwork([4, 8, 8, 3], "cpu")
    assert [type(layer) for layer in network] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [(linear.in_features, linear.out_features) for linear in linears] == [(4, 8), (8, 8), (8, 3)]
    assert not any(linear.bias.any() for linear in linears)
    # He: the second moment of what comes in is kept.
    wide = ReLUNetwork([256, 256, 256, 1], "cpu")
    inputs = torch.randn(400, 256)
    first = nn.Sequential(*list(wide)[:3])
    assert first(inputs).detach().square().mean().item() / 2 == pytest.approx(1.0, abs=0.25)


def test_networks_are_those_of_earlier_checkpoints() -> None:
    torch.manual_seed(7)
    network = ReLUNetwork([5, 8, 3], "cpu")
    torch.manual_seed(7)
    for layer, (fan_in, fan_out) in ((0, (5, 8)), (2, (8, 3))):
        # nn.Linear draws, too: the same numbers come out only in the same order.
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
        assert torch.equal(network.state_dict()[f"{layer}.weight"], linear.weight)
    field = RadianceField(RadianceConfig(hidden_layers=1), feature_width=5, backends=CPU)
    assert [name for name, _ in field.named_parameters()] == [
        *("network.0.weight", "network.0.bias", "network.2.weight", "network.2.bias")
    ]


@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("cuda", marks=needs_triton)])
def test_radiance_of_padding_has_no_part(backend: str) -> None:
    device = DEVICE if backend == "cuda" else torch.device("cpu")
    config = RadianceConfig(hidden_width=16, precision="float32")
    field = RadianceField(config, feature_width=5, backends=Backends.all(backend)).to(device)
    features, normal = torch.randn(9, 5, device=device), on_sphere(9, 1.0).to(device)
    directions, ray_indices = on_sphere(3, 1.0).to(device), torch.arange(9, device=device) // 3
    count = torch.tensor(6, device=device)
    gradients = []
    for rows, real in ((slice(6), None), (slice(9), count)):
        rgb = field(features[rows], directions, ray_indices[rows], normal[rows], real)
        loss = (rgb * torch.arange(1.0, 4.0, device=device)).square().sum()
        gradients.append(torch.autograd.grad(loss, list(field.parameters())))
    for alone, padded in zip(*gradients, strict=True):
        assert alone.any()
        torch.testing.assert_close(padded, alone, atol=1e-6, rtol=1e-5)


def test_radiance_takes_directions_per_ray() -> None:
    field = RadianceField(RadianceConfig(direction_degree=3), feature_width=5, backends=CPU)
    features, normal = torch.randn(6, 5), on_sphere(6, 1.0)
    directions = on_sphere(3, 1.0)
    ray_indices = torch.tensor([2, 0, 0, 1, 2, 2])
    rgb = field(features, directions, ray_indices, normal)
    assert rgb.shape == (6, 3)
    assert ((rgb > 0) & (rgb < 1)).all()
    for sample, ray in enumerate(ray_indices.tolist()):
        alone = field(
            features[sample : sample + 1],
            directions[ray : ray + 1],
            torch.zeros(1, dtype=torch.int64),
            normal[sample : sample + 1],
        )
        torch.testing.assert_close(alone[0], rgb[sample])


def test_radiance_depends_on_all_its_inputs() -> None:
    field = RadianceField(RadianceConfig(), feature_width=5, backends=CPU)
    inputs = [torch.randn(6, 5), on_sphere(6, 1.0), on_sphere(6, 1.0)]
    features, directions, normal = (tensor.requires_grad_() for tensor in inputs)
    rgb = field(features, directions, torch.arange(6), normal)
    for gradient in torch.autograd.grad(rgb.sum(), [features, directions, normal]):
        assert gradient.any(dim=1).all()


def test_radiance_of_nothing() -> None:
    field = RadianceField(RadianceConfig(), feature_width=5, backends=CPU)
    rgb = field(torch.zeros(0, 5), on_sphere(3, 1.0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3))
    assert rgb.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial_radius": 1.0}, r"model\.sdf\.initial_radius"),
        ({"hidden_layers": 0}, r"model\.sdf\.hidden_layers: must be at least 1, got 0"),
        ({"hidden_width": 0}, r"model\.sdf\.hidden_width"),
        ({"feature_width": 0}, r"model\.sdf\.feature_width"),
    ],
)
def test_sdf_config_out_of_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SDFConfig(**change)  # type: ignore[arg-type]


def test_radiance_config_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"model\.radiance\.direction_degree: must lie in 1\.\.5, got 6"):
        RadianceConfig(direction_degree=6)
