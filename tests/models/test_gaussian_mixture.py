"""Mixtures of bivariate normals: published numbers, closed forms where there are some, and estimates near the truth."""

import math

import pytest
import torch

from kinema.models.fpt.mixture import GaussianMixture, coverage


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(loc=(0.0, 0.0), scale=((1.0, 0.0), (0.0, 1.0))) -> GaussianMixture:
    """A single bivariate normal."""
    logits = torch.zeros(1, dtype=torch.float64)
    return GaussianMixture(logits, torch.tensor([loc]).double(), torch.tensor([scale]).double())


def random_mixtures(*batch: int, spread: float = 1.0, num_components: int = 4) -> GaussianMixture:
    generator = seeded(len(batch))

    def draw(*shape):
        return torch.randn(*batch, num_components, *shape, generator=generator, dtype=torch.float64)

    scale = torch.diag_embed(draw(2).exp() * 0.3)
    scale[..., 1, 0] = draw() * 0.3
    return GaussianMixture(draw(), spread * draw(2), scale)


@pytest.fixture
def published(fill):
    """The mixtures of the golden, and the values they are asked about."""

    def draw(name, *shape, **options):
        return fill.normal(0, name, 2, 6, *shape, **options).double()

    scale = torch.diag_embed(fill.uniform(0, "diag", 2, 6, 4, 2, low=0.05, high=0.8).double())
    below = draw("off", 4, std=0.6)
    below[0, 0], below[0, 1] = 0, 5
    scale[..., 1, 0] = below
    return GaussianMixture(draw("logits", 4), draw("loc", 4, 2, std=0.3), scale), draw("value", 2, std=0.6)


def test_golden(golden, published):
    mixture, value = published
    expected = golden("fpt_mixture__s0")
    found = {
        "log_prob": mixture.log_prob(value),
        "cdf": mixture.cdf(value)[None],  # stored with an axis too many
        "component_cdf": mixture.component_cdf(value)[None],
        "mean": mixture.mean,
        "variance": mixture.variance,
        "normalised_logits": mixture.logits,
        "sliced_log_prob": mixture[:, 1:3].log_prob(value[:, 1:3]),
    }
    for name in expected.data:
        expected.check(name, found[name], atol=0, rtol=1e-6)


@pytest.mark.parametrize(
    "index", [0, -1, slice(1, None), (slice(None), 2), (..., 0), (1, slice(0, 3, 2)), torch.tensor([True, False])]
)
def test_slicing_gives_the_mixtures_at_those_places(index, published):
    mixture, value = published
    part = mixture[index]
    value_there = torch.stack([coordinate[index] for coordinate in value.unbind(-1)], dim=-1)
    assert torch.equal(part.log_prob(value_there), mixture.log_prob(value)[index])
    assert part.batch_shape == value_there.shape[:-1]


def test_torch_distributions_agree(published):
    mixture, value = published
    theirs = torch.distributions.MixtureSameFamily(mixture.mixture_distribution, mixture.component_distribution)
    torch.testing.assert_close(mixture.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(mixture.covariance, mixture.component_distribution.covariance_matrix)


def test_log_prob_has_correct_gradients():
    mixture = random_mixtures(3)
    value = torch.randn(3, 2, dtype=torch.float64, generator=seeded())
    parameters = [t.requires_grad_() for t in (mixture.logits, mixture.loc, mixture.scale_tril)]
    assert torch.autograd.gradcheck(lambda *p: GaussianMixture(*p).log_prob(value), parameters)


def test_log_prob_stays_finite_far_away_and_at_tiny_scales():
    narrow = normal(scale=((1e-4, 0.0), (0.0, 1e-4)))
    assert narrow.log_prob(torch.tensor([2.0, -2.0]).double()).item() == pytest.approx(-4e8, rel=1e-3)
    assert narrow.log_prob(torch.zeros(2).double()).item() == pytest.approx(-math.log(2 * math.pi * 1e-8))


@pytest.mark.parametrize("correlation", [-0.95, -0.5, 0.0, 0.3, 0.9, 0.99])
def test_cdf_at_the_centre_has_a_closed_form(correlation):
    """P(X <= 0, Y <= 0) = 1/4 + asin(correlation) / 2 pi (Sheppard)."""
    mixture = normal(scale=((2.0, 0.0), (0.1 * correlation, 0.1 * math.sqrt(1 - correlation**2))))
    found = mixture.cdf(torch.zeros(2).double()).item()
    assert found == pytest.approx(0.25 + math.asin(correlation) / (2 * math.pi), abs=1e-6)


def test_cdf_counts_samples():
    mixture = random_mixtures(3)
    value = mixture.mean
    share = (mixture.sample((40_000,), generator=seeded()) <= value).all(-1).double().mean(0)
    torch.testing.assert_close(mixture.cdf(value), share, atol=0.01, rtol=0)


def test_samples_have_the_moments_of_the_mixture():
    mixture = random_mixtures(2, 3)
    samples = mixture.sample((40_000,), generator=seeded())
    assert samples.shape == (40_000, 2, 3, 2)
    deviation = mixture.variance.sqrt()
    torch.testing.assert_close(samples.mean(0) / deviation, mixture.mean / deviation, atol=0.03, rtol=0)
    torch.testing.assert_close(samples.var(0), mixture.variance, atol=0, rtol=0.1)


def test_samples_depend_on_the_generator_only():
    mixture = random_mixtures(5)
    first = mixture.sample(generator=seeded(1))
    torch.manual_seed(99)
    assert torch.equal(first, mixture.sample(generator=seeded(1)))
    assert not torch.equal(first, mixture.sample(generator=seeded(2)))
    assert first.shape == (5, 2)


def test_samples_and_estimates_carry_no_gradient():
    mixture = random_mixtures(2)
    mixture.loc.requires_grad_()
    assert not mixture.sample().requires_grad
    assert not mixture.entropy(4).requires_grad
    assert not mixture.mode(2).requires_grad


def test_components_that_hardly_weigh_are_hardly_drawn():
    loc = torch.tensor([[0.0, 0.0], [100.0, 100.0]]).double()
    mixture = GaussianMixture(torch.tensor([0.0, -40.0]).double(), loc, torch.eye(2).double().expand(2, 2, 2))
    assert mixture.sample((5000,), generator=seeded()).abs().max() < 10


def test_mode_is_the_highest_point_of_a_fine_grid():
    mixture = random_mixtures(6, spread=0.7)
    axis = torch.linspace(-3, 3, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    highest = mixture.log_prob(grid[:, None]).amax(0)
    assert (mixture.log_prob(mixture.mode()) >= highest - 1e-9).all()


def test_mode_of_one_normal_is_its_mean_and_of_two_the_sharper():
    assert normal(loc=(0.3, -0.2)).mode().tolist() == pytest.approx([0.3, -0.2])
    scale = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.1, 0.0], [0.0, 0.1]]]).double()
    loc = torch.tensor([[5.0, 5.0], [-5.0, -5.0]]).double()
    assert GaussianMixture(torch.tensor([0.7, 0.3]).double().log(), loc, scale).mode().tolist() == pytest.approx(
        [-5, -5]
    )


def test_entropy_of_normals_far_apart():
    """Of one normal: log(2 pi e) + log det L; two that do not meet add log 2."""
    scale = torch.tensor([[0.5, 0.0], [3.0, 0.2]]).double()
    one = math.log(2 * math.pi * math.e) + math.log(0.5 * 0.2)
    two = GaussianMixture(
        torch.zeros(2).double(), torch.tensor([[-50.0, 0.0], [50.0, 0.0]]).double(), scale.expand(2, 2, 2)
    )
    assert normal(scale=scale.tolist()).entropy(2000, seeded()).item() == pytest.approx(one, abs=1e-2)
    assert two.entropy(2000, seeded()).item() == pytest.approx(one + math.log(2), abs=1e-2)
    assert two.entropy_bounds()[1].item() == pytest.approx(one + math.log(2))


def test_entropy_lies_between_its_bounds_and_has_the_error_it_claims():
    mixture = random_mixtures(50)
    exact = mixture.entropy(4000, seeded())
    lower, upper = mixture.entropy_bounds()
    assert (lower < exact).all() and (exact < upper + 0.005).all()
    error = mixture.entropy(generator=seeded(1)) - exact
    assert error.std() < 0.03 and error.mean().abs() < 0.01


def test_divergence_of_two_normals_has_a_closed_form():
    first = normal(loc=(0.3, 0.0), scale=((0.5, 0.0), (0.0, 0.5)))
    second = normal()
    expected = 0.5 * (2 * 0.25 + 0.09 - 2 - math.log(0.25**2))
    assert first.kl_divergence(second, 2000, seeded()).item() == pytest.approx(expected, abs=5e-3)


def test_divergence_is_zero_only_of_equals():
    mixture = random_mixtures(4)
    assert mixture.kl_divergence(mixture).abs().max() == 0
    assert (mixture.kl_divergence(random_mixtures(4, num_components=2), generator=seeded()) > 0.05).all()


@pytest.mark.parametrize("distance", [0.0, 0.5, 1.5, 3.0])
def test_credible_level_of_a_normal_has_a_closed_form(distance):
    """Inside radius d of a standard normal in the plane lies 1 - exp(-d^2 / 2)."""
    scale = torch.tensor([[0.5, 0.0], [3.0, 0.2]]).double()
    value = scale @ torch.tensor([distance, 0.0]).double()
    level = normal(scale=scale.tolist()).credible_level(value, 2000, seeded()).item()
    assert level == pytest.approx(1 - math.exp(-(distance**2) / 2), abs=2e-3)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.95])
def test_credible_region_of_a_normal_has_a_closed_form(probability):
    border = normal().credible_region(probability, 2000, seeded()).item()
    assert border == pytest.approx(math.log(1 - probability) - math.log(2 * math.pi), abs=0.02)


def test_credible_region_holds_its_probability():
    mixture = random_mixtures(7)
    border = mixture.credible_region(0.8, 1000, seeded())
    samples = mixture.sample((20_000,), generator=seeded(1))
    share = (mixture.log_prob(samples) >= border).double().mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 0.8), atol=0.02, rtol=0)


def test_coverage_is_calibrated_for_own_samples_and_not_for_wider_ones():
    mixture = random_mixtures(2000)
    probabilities = torch.tensor([0.1, 0.5, 0.9])
    value = mixture.sample(generator=seeded())
    own = coverage(mixture.credible_level(value, generator=seeded(1)), probabilities)
    torch.testing.assert_close(own, probabilities, atol=0.03, rtol=0)
    wider = mixture.mean + 2 * (value - mixture.mean)
    assert (coverage(mixture.credible_level(wider, generator=seeded(1)), probabilities) < probabilities - 0.02).all()


def test_moving_to_another_dtype_keeps_the_distribution():
    mixture = random_mixtures(4)
    value = mixture.mean
    narrow = mixture.to(torch.float32)
    assert narrow.log_prob(value.float()).dtype == torch.float32
    torch.testing.assert_close(narrow.log_prob(value.float()).double(), mixture.log_prob(value), atol=1e-4, rtol=1e-4)


def test_bad_arguments_are_named():
    mixture = random_mixtures(2)
    with pytest.raises(ValueError, match=r"probability=1\.5 is not between 0 and 1"):
        mixture.credible_region(1.5)
    with pytest.raises(ValueError, match="num_points=0 is below 1"):
        mixture.entropy(0)
