//! The emulator itself: right results, and the mistakes that it must find.

use half::{bf16, f16};
use linfusion_cuda_emulator::{Memory, Plant, Settings, Watch, conversions, emulate};
use linfusion_ops::cuda::params::{LinearParams, Params};
use linfusion_ops::cuda::plan::Launch;

fn launch(
    kernel: &str,
    grid: u32,
    threads: u32,
    shared_bytes: u32,
    params: LinearParams,
) -> Launch {
    Launch {
        kernel: kernel.into(),
        grid: [grid, 1, 1],
        threads,
        shared_bytes,
        params: Params::Linear(params),
    }
}

fn settings(seed: u64, plant: Plant) -> Settings {
    Settings {
        seed,
        plant,
        ..Settings::default()
    }
}

fn floats(memory: &Memory) -> Vec<f32> {
    let bytes = memory.bytes();
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_ne_bytes(b.try_into().unwrap()))
        .collect()
}

fn of_floats(values: &[f32]) -> Memory {
    Memory::of(
        &values
            .iter()
            .flat_map(|x| x.to_ne_bytes())
            .collect::<Vec<_>>(),
        0,
    )
}

/// Runs the matrix product of small whole numbers, which is exact; how many of its elements are right.
fn right_products(seed: u64, plant: Plant) -> usize {
    let steps = 4;
    let number = |i: usize, salt: usize| ((i * 7 + salt) % 11) as f32 - 5.0;
    let halves = |salt: usize| {
        let each = |i: usize| f16::from_f32(number(i, salt)).to_ne_bytes();
        Memory::of(&(0..16 * 16 * steps).flat_map(each).collect::<Vec<_>>(), 0)
    };
    let (a, b, c) = (halves(1), halves(4), Memory::new(16 * 16 * 4, 0));
    let mut params = LinearParams {
        keys: steps as i64,
        ..Default::default()
    };
    params.q.data = a.address();
    params.k.data = b.address();
    params.out.data = c.address();
    // SAFETY: the memory that the kernel takes.
    unsafe {
        emulate(
            &launch("emulator_product", 1, 32, 2048, params),
            &settings(seed, plant),
        )
    }
    .unwrap();
    let found = floats(&c);
    let right = |i: usize| {
        let (row, column) = (i / 16, i % 16);
        let width = 16 * steps;
        let terms = (0..width).map(|k| number(row * width + k, 1) * number(column * width + k, 4));
        found[i] == terms.sum::<f32>()
    };
    (0..256).filter(|i| right(*i)).count()
}

fn sums(seed: u64, plant: Plant) -> Vec<f32> {
    let numbers: Vec<f32> = (0..1024).map(|i| (i % 13) as f32).collect();
    let (q, out) = (of_floats(&numbers), Memory::new(16, 0));
    let mut params = LinearParams::default();
    params.q.data = q.address();
    params.out.data = out.address();
    // SAFETY: the memory that the kernel takes.
    unsafe {
        emulate(
            &launch("emulator_sum", 4, 256, 1024, params),
            &settings(seed, plant),
        )
    }
    .unwrap();
    floats(&out)
}

fn reversed(plant: Plant) -> Vec<f32> {
    let numbers: Vec<f32> = (0..32).map(|i| i as f32).collect();
    let (q, out) = (of_floats(&numbers), Memory::new(128, 0));
    let mut params = LinearParams::default();
    params.q.data = q.address();
    params.out.data = out.address();
    // SAFETY: the memory that the kernel takes.
    unsafe {
        emulate(
            &launch("emulator_reverse", 1, 32, 128, params),
            &settings(3, plant),
        )
    }
    .unwrap();
    floats(&out)
}

#[test]
fn right_kernels_give_right_results_in_any_order() {
    let whole: Vec<f32> = (0..4)
        .map(|b| (b * 256..(b + 1) * 256).map(|i| (i % 13) as f32).sum())
        .collect();
    let back: Vec<f32> = (0..32).rev().map(|i| i as f32).collect();
    for seed in 0..8 {
        assert_eq!(right_products(seed, Plant::None), 256, "seed {seed}");
        assert_eq!(sums(seed, Plant::None), whole, "seed {seed}");
    }
    assert_eq!(reversed(Plant::None), back);
}

#[test]
fn planted_mistakes_show() {
    let whole = sums(1, Plant::None);
    for seed in 0..8 {
        assert_ne!(
            right_products(seed, Plant::WaitOffByOne),
            256,
            "seed {seed}"
        );
        assert_ne!(sums(seed, Plant::MissingBarrier), whole, "seed {seed}");
    }
    assert_ne!(reversed(Plant::MissingWarpBarrier), reversed(Plant::None));
}

#[test]
fn mistakes_are_told_with_their_place() {
    let fails = |kernel: &str, threads, shared, part: &str| {
        // SAFETY: these kernels use no memory.
        let result = unsafe {
            emulate(
                &launch(kernel, 1, threads, shared, LinearParams::default()),
                &Settings::default(),
            )
        };
        let text = result.unwrap_err().to_string();
        assert!(text.contains(part) && text.contains(kernel), "{text}");
    };
    fails("emulator_divergence", 32, 0, "divergence");
    fails("emulator_deadlock", 64, 0, "deadlock");
    fails(
        "emulator_stray",
        32,
        1024,
        "a matrix load of 16 bytes at offset 1024 of 1024",
    );
    fails("emulator_sum", 48, 1024, "whole warps");
    fails("emulator_none", 32, 0, "no kernel");
}

fn watched(plant: Plant) -> Settings {
    Settings {
        plant,
        watch: Watch::Memory,
        ..Settings::default()
    }
}

#[test]
fn races_and_strays_are_told_with_their_place() {
    for (kernel, grid, threads, shared, part) in [
        ("emulator_overtaken", 1, 64, 256, "race: offset"),
        ("emulator_hasty", 1, 32, 512, "race: offset"),
        ("emulator_clash", 2, 32, 0, "written by another block"),
        (
            "emulator_behind",
            1,
            32,
            0,
            "4 bytes at offset 128 of a tensor of 128",
        ),
        ("emulator_input", 1, 32, 0, "a store into an input"),
        (
            "emulator_spill",
            1,
            32,
            128,
            "4 bytes at offset 128 of 128 bytes of shared memory",
        ),
    ] {
        let (q, out) = (of_floats(&[1.0; 32]), Memory::new(256, 0));
        let mut params = LinearParams::default();
        params.q.data = q.address();
        params.out.data = out.address();
        let launch = launch(kernel, grid, threads, shared, params);
        // SAFETY: watched, so that no access goes outside.
        let result = unsafe { emulate(&launch, &watched(Plant::None)) };
        let text = result.expect_err(kernel).to_string();
        assert!(text.contains(part) && text.contains(kernel), "{text}");
    }
}

#[test]
fn races_are_found_even_where_numbers_are_right() {
    let run = |launch: &Launch, plant| {
        // SAFETY: the memory that the kernels take.
        unsafe { emulate(launch, &watched(plant)) }.map_err(|e| e.to_string())
    };
    let (q, out) = (of_floats(&[1.0; 1024]), Memory::new(1024, 0));
    let mut params = LinearParams {
        keys: 1,
        ..Default::default()
    };
    params.q.data = q.address();
    params.k.data = q.address();
    params.out.data = out.address();
    let sum = launch("emulator_sum", 4, 256, 1024, params);
    let reverse = launch("emulator_reverse", 1, 32, 128, params);
    let product = launch("emulator_product", 1, 32, 2048, params);
    for launch in [&sum, &reverse, &product] {
        assert_eq!(run(launch, Plant::None), Ok(()));
    }
    for (launch, plant) in [
        (&sum, Plant::MissingBarrier),
        (&reverse, Plant::MissingWarpBarrier),
        (&product, Plant::WaitOffByOne),
    ] {
        let text = run(launch, plant).unwrap_err();
        assert!(text.contains("race"), "{text}");
    }
}

#[test]
fn conversions_are_those_of_the_standard() {
    for bits in 0..=u16::MAX {
        let exact = f16::from_bits(bits).to_f32();
        let found = conversions::half_to_float(bits);
        assert!(
            found.to_bits() == exact.to_bits() || found.is_nan() && exact.is_nan(),
            "{bits:#x}"
        );
        if exact.is_nan() {
            assert!(f16::from_bits(conversions::float_to_half(exact)).is_nan());
            continue;
        }
        // The number itself, half way to the next, and on both sides of that.
        let next = f16::from_bits(bits.wrapping_add(1)).to_f32();
        let half_way = exact / 2.0 + next / 2.0;
        for value in [exact, half_way, half_way.next_up(), half_way.next_down()] {
            if value.is_nan() {
                continue;
            }
            assert_eq!(
                conversions::float_to_half(value),
                f16::from_f32(value).to_bits(),
                "{value:e}"
            );
        }
        let wide = bf16::from_bits(bits).to_f32();
        let half_way = f32::from_bits(wide.to_bits() | 0x8000);
        for value in [wide, half_way, f32::from_bits(half_way.to_bits() + 1)] {
            if value.is_nan() {
                assert!(bf16::from_bits(conversions::float_to_brain(value)).is_nan());
            } else {
                assert_eq!(
                    conversions::float_to_brain(value),
                    bf16::from_f32(value).to_bits(),
                    "{value:e}"
                );
            }
        }
    }
}
