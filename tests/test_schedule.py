"""The schedule's numbers against Table S1, supplement A.1 and diffusers' own shift."""

import json
import math

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.spatial.distance import jensenshannon

import ralu
from ralu.presets import DISTILLED, PRESETS, SOLVED, preset
from ralu.schedule import (
    Schedule,
    Stage,
    densities,
    match_noise,
    region_adaptive,
    resample_noise,
    shifted,
    single,
    solve,
    two_resolutions,
)

# Table S1: cumulative steps, ends, h, c. The starred entries look like slips (paper.md): recomputed 6.121 and 2.273.
TABLE_S1 = {
    "flux-5x": ([4, 9, 15], [0.3, 0.45, 1.0], [5.12, 2.64, 2.25], 0.0177),
    "flux-7x": ([2, 5, 10], [0.2, 0.3, 1.0], [8.14, 2.86, 2.19], 0.0255),
    "sd3-2x": ([5, 11, 20], [0.2, 0.3, 1.0], [6.21, 2.23, 1.97], 0.0586),
    "sd3-3x": ([3, 6, 12], [0.25, 0.3, 1.0], [6.40, 2.60, 2.23], 0.0255),
}
SLIPS = {("sd3-2x", 0), ("sd3-3x", 2)}


@pytest.mark.parametrize("name", TABLE_S1)
def test_preset_is_table_s1(name):
    totals, ends, shifts, c = TABLE_S1[name]
    chosen = preset(name)
    assert list(np.cumsum(chosen.steps)) == totals
    assert (list(chosen.ends), list(chosen.shifts), chosen.c) == (ends, shifts, c)
    assert chosen.ratio == (0.3 if name == "sd3-2x" else 0.2)


@pytest.mark.parametrize("name", TABLE_S1)
def test_solve_reproduces_table_s1(name):
    totals, ends, shifts, c = TABLE_S1[name]
    solved = solve(tuple(np.diff([0, *totals]).tolist()), tuple(ends), shift=3.0)
    assert solved.c == pytest.approx(c, abs=5.1e-5)  # the table has 4 decimals
    for k in range(3):
        assert solved.shifts[k] == pytest.approx(shifts[k], abs=0.1 if (name, k) in SLIPS else 0.05)


@pytest.mark.parametrize("name", [name for name in SOLVED if name != "distilled-4"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_other_presets_are_solved_for_the_models_shift(name, shift):
    chosen = preset(name, shift=shift)
    assert chosen == solve(SOLVED[name].steps, SOLVED[name].ends, shift)
    assert preset(name) == preset(name, shift=SOLVED[name].shift)
    assert (chosen.steps == (1, 1, 2)) is (name in DISTILLED)
    assert 0 < chosen.c <= 0.25 and all(0.5 <= h <= 10 for h in chosen.shifts)


def distance(schedule, shift):
    _, target, achieved = densities(schedule, shift)
    return jensenshannon(target, achieved)


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_distilled_presets_are_solved_for_the_models_shift(shift):
    chosen = preset("distilled-4", shift=shift)
    assert chosen.steps == (1, 1, 2) and chosen.ends == (0.3, 0.45, 1.0)
    solved = solve(chosen.steps, chosen.ends, shift)
    assert distance(chosen, shift) == pytest.approx(distance(solved, shift), rel=0.01)
    for h, expected in zip(chosen.shifts, solved.shifts, strict=True):
        assert h == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solve_is_a_minimum_for_that_shift(shift):
    solved = solve([4, 5, 6], [0.3, 0.45, 1.0], shift=shift)
    best = distance(solved, shift)
    for k in range(3):
        for factor in (0.97, 1.03):
            shifts = [h * factor if i == k else h for i, h in enumerate(solved.shifts)]
            if 0.5 <= shifts[k] <= 10:  # the search's bounds
                assert distance(solved.replace(shifts=shifts), shift) > best
    assert distance(solved, 4.0 - shift) > best + 0.01  # the other shift's target is another one


@pytest.mark.parametrize("end", [0.05, 0.3, 0.45, 0.9])
@pytest.mark.parametrize("c", [1e-4, 0.0177, 0.25])
def test_transition_satisfies_s3_to_s6(end, c):
    transition = match_noise("select", end, c)
    assert transition.scale * end == pytest.approx(transition.start, abs=1e-12)  # S3
    assert transition.scale * (1 - end) == pytest.approx(transition.noise_scale * math.sqrt(c), abs=1e-12)  # S5
    assert transition.noise_scale == pytest.approx(1 - transition.start, abs=1e-12)  # S6
    assert transition.start < end


@pytest.mark.parametrize("name", TABLE_S1)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sigmas_equal_diffusers_shift(name, stage):
    chosen = preset(name)
    sigmas = chosen.sigmas(stage)
    start, end, h, n = (x[stage - 1] for x in (chosen.starts, chosen.ends, chosen.shifts, chosen.steps))
    assert (sigmas[0], sigmas[-1]) == (1 - start, 1 - end) and len(sigmas) == n + 1
    raw = np.linspace(*(float(s / (h - (h - 1) * s)) for s in (1 - start, 1 - end)), n + 1)
    stock = FlowMatchEulerDiscreteScheduler(shift=h)
    stock.set_timesteps(sigmas=raw[:-1].tolist())
    np.testing.assert_allclose(sigmas[:-1], stock.sigmas[:-1].double().numpy(), atol=2e-7)


def test_shift_is_undone_by_its_inverse():
    u = np.linspace(0, 1, 101)
    np.testing.assert_allclose(shifted(shifted(u, 5.12), 1 / 5.12), u, atol=1e-12)


def test_densities_integrate_to_one():
    t, target, achieved = densities(preset("flux-5x"), shift=3.0, points=200_001)
    assert np.trapezoid(target, t) == pytest.approx(1, abs=1e-4)
    assert np.trapezoid(achieved, t) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"steps": (4, 5)}, "steps"),
        ({"steps": (4, 0, 6)}, "steps"),
        ({"ends": (0.45, 0.3, 1.0)}, "ends"),
        ({"ends": (0.3, 0.45, 0.9)}, "ends"),
        ({"shifts": (1.0, -1.0, 1.0)}, "shifts"),
        ({"c": 0.3}, "c must"),
        ({"ratio": 1.5}, "ratio"),
    ],
)
def test_wrong_numbers_are_named(change, word):
    right = {"steps": (4, 5, 6), "ends": (0.3, 0.45, 1.0), "shifts": (5.0, 3.0, 2.0), "c": 0.02}
    with pytest.raises(ValueError, match=word):
        region_adaptive(**(right | change))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1", None, 1j, [], True])
@pytest.mark.parametrize("name", ["steps", "ends", "shifts", "c", "ratio", "shift"])
def test_no_number_is_refused_by_name(name, bad):
    """In a schedule and in the search for one."""
    right = {"steps": (4, 5, 6), "ends": (0.3, 0.45, 1.0), "shifts": (5.0, 3.0, 2.0), "c": 0.02, "ratio": 0.2}
    wrong = {name: (right[name][0], bad, right[name][2]) if name in ("steps", "ends", "shifts") else bad}
    if name != "shift":
        with pytest.raises((ValueError, TypeError), match=rf"\b{name} must"):
            region_adaptive(**right | wrong)
    if name not in ("shifts", "c"):
        with pytest.raises((ValueError, TypeError), match=rf"\b{name} must"):
            solve(**{key: right[key] for key in ("steps", "ends")} | wrong)


FULL, LOW = Stage("full", 3, 1.0, 1.0), Stage("low", 2, 0.5, 1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((),), "one fewer than the 0 stages, got 0"),
        (((FULL, FULL),), "one fewer than the 2 stages, got 0"),
        (((LOW,),), "last of the stages must be full and end at 1"),
        (
            ((LOW, FULL), (match_noise("select", 0.5, 0.1),)),
            "'select' lead from low to mixed, got one from low to full",
        ),
        (((LOW, FULL), (match_noise("complete", 0.5, 0.1),)), "'complete' lead from mixed to full"),
        (((FULL, FULL), (resample_noise(0.5),)), "'resample' lead from full to low or low to full, got one from full"),
        (((Stage("low", 2, 0.1, 1.0), FULL, FULL), (resample_noise(0.2),) * 2), "got one from full to full"),
        ((("full",),), "stages must be Stages, got 'full'"),
        (((FULL,), (), math.nan), "ratio must lie"),
        (((FULL,), (), 1.1), "ratio must lie"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Schedule(*arguments)


def test_a_stage_must_end_after_it_starts():
    early = Stage("low", 2, 0.3, 1.0)
    with pytest.raises(ValueError, match=r"got 0\.3 after 0\.4"):
        Schedule((Stage("full", 2, 0.6, 1.0), early, FULL), (resample_noise(0.4), resample_noise(0.2)))


@pytest.mark.parametrize("chosen", [preset("flux-5x"), preset("sd3-2x", matching="snr"), single(10, 3.0),
                                    two_resolutions((3, 4), 0.3, (5.0, 2.0), 0.25)])  # fmt: skip
def test_a_schedule_comes_back_from_json(chosen):
    assert Schedule(**json.loads(json.dumps(chosen.to_dict()))) == chosen


def test_speeds_transition_is_renoising_at_a_quarter():
    """SPEED with the Haar basis: a = 1 / (1 + sigma), b = sigma' = 2·sigma / (1 + sigma)."""
    for end in (0.2, 0.3, 0.45):
        (transition,) = two_resolutions((3, 4), end, (1.0, 1.0), 0.25).transitions
        sigma = 1 - end
        assert transition.kind == "renoise" and transition.c == 0.25
        assert transition.scale == pytest.approx(1 / (1 + sigma)) and transition.noise_scale == pytest.approx(
            2 * sigma / (1 + sigma)
        )


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"flux-5x.*distilled-4.*'nope'"):
        preset("nope")
    assert preset("flux-5x", ratio=0.4).ratio == 0.4 and PRESETS["flux-5x"].ratio == 0.2


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_name_is_one_schedule(shift):
    """`preset` without a shift is for what a scheduler without one is for, FLUX.1-schnell."""
    assert ralu.RaluScheduler("distilled-4", shift=shift).schedule == ralu.preset("distilled-4", shift=shift)
    assert ralu.RaluScheduler("distilled-4").schedule == ralu.preset("distilled-4")
