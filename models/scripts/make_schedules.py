#!/usr/bin/env python3
"""Runs diffusers' samplers on made-up model outputs, to test the runtime's samplers by.

    python3 models/scripts/make_schedules.py models/fixtures/schedules.json

A case is a configuration, a number of steps and a first evaluation; for each evaluation the time step, the scaled input,
the model's output, the noise that was drawn and the sample after it.
"""

import json
import math
import pathlib
import sys

import diffusers
import torch

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
V = dict(prediction_type="v_prediction")
SHAPE = (1, 1, 2, 3)

# Class, configuration, steps, first step.
CASES = [
    ("DDIMScheduler", {**SD, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}, 5, 0),
    ("DDIMScheduler", {**SD, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, **V}, 5, 2),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, **V, **SD}, 4, 0),
    ("DDIMScheduler", {"timestep_spacing": "linspace", "prediction_type": "sample", "clip_sample_range": 0.7}, 7, 3),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "eta": 0.6}, 5, 0),
    ("DDIMScheduler", {"trained_betas": [0.1, 0.2, 0.05, 0.3, 0.1, 0.02, 0.4, 0.1], "num_train_timesteps": 8}, 3, 0),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1}, 7, 0),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1, **V}, 7, 3),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True}, 1, 0),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True, "timestep_spacing": "trailing"}, 6, 0),
    ("PNDMScheduler", {"set_alpha_to_one": True}, 6, 0),
    ("PNDMScheduler", {"timestep_spacing": "linspace"}, 8, 0),
    ("EulerDiscreteScheduler", {**SD, "steps_offset": 1, "timestep_spacing": "leading"}, 6, 0),
    ("EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True}, 6, 0),
    ("EulerDiscreteScheduler", {**SD, "use_exponential_sigmas": True, **V}, 6, 2),
    ("EulerDiscreteScheduler", {**SD, "timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}, 4, 0),
    ("EulerDiscreteScheduler", {**SD, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 4, 0),
    ("EulerDiscreteScheduler", {**SD, **V, "timestep_type": "continuous", "use_karras_sigmas": True,
                                "sigma_min": 0.002, "sigma_max": 700.0}, 5, 0),
    ("EulerDiscreteScheduler", {**SD}, 1, 0),
    ("EulerAncestralDiscreteScheduler", {**SD, "steps_offset": 1}, 5, 0),
    ("EulerAncestralDiscreteScheduler", {**SD, **V, "timestep_spacing": "trailing"}, 5, 2),
    ("DPMSolverMultistepScheduler", {}, 4, 0),
    ("DPMSolverMultistepScheduler", {**SD, "use_karras_sigmas": True}, 8, 0),
    ("DPMSolverMultistepScheduler", {**SD, "use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}, 5, 0),
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}, 18, 0),
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3, **V}, 6, 2),
    ("DPMSolverMultistepScheduler", {**SD, "solver_type": "heun", "timestep_spacing": "leading", "steps_offset": 1}, 6, 0),
    ("DPMSolverMultistepScheduler", {**SD, "euler_at_final": True, "final_sigmas_type": "sigma_min"}, 16, 0),
    ("DPMSolverMultistepScheduler", {**SD, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, 5, 0),
    ("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, 6, 0),
    ("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun",
                                     "timestep_spacing": "trailing"}, 6, 1),
    ("DPMSolverMultistepScheduler", {**SD, "prediction_type": "sample", "solver_order": 1}, 3, 0),
    ("UniPCMultistepScheduler", {**SD}, 7, 0),
    ("UniPCMultistepScheduler", {**SD, "solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, 8, 0),
    ("UniPCMultistepScheduler", {**SD, "use_karras_sigmas": True, **V}, 6, 2),
    ("UniPCMultistepScheduler", {"disable_corrector": [0, 1], "timestep_spacing": "trailing"}, 5, 0),
    ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading", "steps_offset": 1}, 4, 0),
    ("LCMScheduler", {**SD}, 4, 0),
    ("LCMScheduler", {**SD, "original_inference_steps": 25, "set_alpha_to_one": False, **V}, 3, 0),
    ("LCMScheduler", {**SD, "strength": 0.6}, 4, 0),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 6, 0),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 6, 2),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
                                         "image_tokens": 1000}, 5, 0),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1,
                                         "image_tokens": 5000}, 5, 0),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, 5, 0),
]


def numbers(tensor):
    """In single precision, as few digits as say which."""
    return [float(f"{v:.9g}") for v in tensor.flatten().tolist()]


def run(name, config, steps, first):
    config = dict(config)
    eta, tokens, strength = config.pop("eta", 0.0), config.pop("image_tokens", None), config.pop("strength", 1.0)
    scheduler = getattr(diffusers, name)(**config)
    if strength < 1:
        scheduler.set_timesteps(steps, strength=strength)
    elif tokens is None:
        scheduler.set_timesteps(steps)
    else:
        c = scheduler.config
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        scheduler.set_timesteps(steps, mu=tokens * slope + c.base_shift - slope * c.base_image_seq_len)
    order = getattr(scheduler, "order", 1)
    timesteps = scheduler.timesteps
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(SHAPE, generator=generator)
    noise = torch.randn(SHAPE, generator=generator)
    start = sample.clone()
    # As image-to-image pipelines begin.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first * order)
    at = timesteps[first * order : first * order + 1]
    noised = scheduler.scale_noise(start, at, noise) if hasattr(scheduler, "scale_noise") else scheduler.add_noise(start, noise, at)
    sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
    sample = noised if first or strength < 1 else sample * sigma
    case = dict(
        scheduler=dict(_class_name=name, **config), steps=steps, first=first * order, eta=eta, strength=strength,
        image_tokens=tokens,
        timesteps=[float(t) for t in timesteps], init_noise_sigma=sigma, original=numbers(start), noise=numbers(noise),
        noised=numbers(noised), sample=numbers(sample), evaluations=[],
    )
    for index, t in enumerate(timesteps[first * order :]):
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        output = torch.sin(1.3 * scaled + float(t) / 300) + 0.1 * torch.cos(torch.arange(6.0).reshape(SHAPE) * (index + 1.0))
        options = {}
        if name == "DDIMScheduler":
            options["eta"] = eta
        drawn = torch.Generator().manual_seed(100 + index)
        if name not in ("PNDMScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"):
            options["generator"] = drawn
        sample = scheduler.step(output, t, sample, return_dict=False, **options)[0]
        again = torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + index))
        case["evaluations"].append(
            dict(input=numbers(scaled), output=numbers(output), noise=numbers(again), sample=numbers(sample))
        )
        assert all(math.isfinite(v) for v in case["evaluations"][-1]["sample"]), (name, config, index)
    return case


def main():
    cases = [run(*case) for case in CASES]
    pathlib.Path(sys.argv[1]).write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
    print(f"{len(cases)} cases, diffusers {diffusers.__version__}")


if __name__ == "__main__":
    main()
