//! The fuzz targets without a fuzzer: the same mutations of small models every time.
//!
//! `make fuzz` looks further, with coverage to guide it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use buffa::Message;
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::proto::{AttributeProto, ModelProto};
use linfusion_models::random::SplitMix64;

#[path = "../../fuzz/src/targets.rs"]
mod targets;

use targets::Reached;

/// How many mutated models; a third of them in bytes, the others in messages.
const READS: u64 = 6_000;
const CONVERSIONS: u64 = 1_500;

#[test]
fn reading_does_not_panic() {
    let seeds = [seeds("read"), seeds("convert")].concat();
    let reached = mutate(&seeds, READS, targets::read);
    assert!(
        reached[&Reached::Model] > READS as usize / 10,
        "{reached:?}"
    );
}

#[test]
fn converting_does_not_panic() {
    let folder = tempfile::tempdir().unwrap();
    let seeds = seeds("convert");
    for seed in &seeds {
        assert_eq!(targets::convert(seed, folder.path()), Reached::Converted);
    }
    let reached = mutate(&seeds, CONVERSIONS, |data| {
        targets::convert(data, folder.path())
    });
    // Mutations that leave nothing to convert, or that change nothing, test little.
    let converted = reached[&Reached::Converted];
    let n = CONVERSIONS as usize;
    assert!(converted > n / 10 && converted < n * 9 / 10, "{reached:?}");
}

/// The committed models that the fuzzer starts from.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
    let entries = std::fs::read_dir(folder.join(target)).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty());
    paths.iter().map(|p| std::fs::read(p).unwrap()).collect()
}

/// Runs `target` on mutated `seeds`; a panic is reported with the bytes that caused it.
fn mutate(
    seeds: &[Vec<u8>],
    cases: u64,
    target: impl Fn(&[u8]) -> Reached,
) -> std::collections::HashMap<Reached, usize> {
    let mut reached: std::collections::HashMap<_, _> =
        [Reached::Nothing, Reached::Model, Reached::Converted]
            .map(|r| (r, 0))
            .into();
    let mut failures = Vec::new();
    for case in 0..cases {
        let mut random = Random(SplitMix64::new(case));
        let mut data = seeds[random.below(seeds.len())].clone();
        if case % 3 == 0 {
            change_bytes(&mut data, seeds, &mut random);
        } else {
            change_message(&mut data, &mut random);
        }
        match catch_unwind(AssertUnwindSafe(|| target(&data))) {
            Ok(r) => *reached.entry(r).or_default() += 1,
            Err(_) => {
                let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("panic-{case}"));
                std::fs::write(&path, &data).unwrap();
                failures.push(path);
            }
        }
    }
    assert!(failures.is_empty(), "these inputs panic: {failures:#?}");
    reached
}

struct Random(SplitMix64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0.below(end)
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.below(from.len())].clone())
    }

    /// A size, an axis or an index that somebody forgot to check.
    fn number(&mut self) -> i64 {
        const EDGES: [i64; 14] = [
            0,
            1,
            -1,
            2,
            3,
            -2,
            4,
            7,
            13,
            1 << 20,
            i64::MAX,
            i64::MIN,
            1 << 32,
            -4,
        ];
        EDGES[self.below(EDGES.len())]
    }
}

/// Bits, lengths and pieces, as a damaged file has them.
fn change_bytes(data: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    for _ in 0..=random.below(3) {
        let at = random.below(data.len());
        match random.below(5) {
            0 => data.truncate(at),
            1 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let piece = &other[from..(from + random.below(64)).min(other.len())];
                data.splice(at..at, piece.iter().copied());
            }
            2 => {
                let end = (at + random.below(16)).min(data.len());
                data.drain(at..end);
            }
            _ => {
                if let Some(byte) = data.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
    }
}

/// What parses still, and means something else.
fn change_message(data: &mut Vec<u8>, random: &mut Random) {
    let file = OnnxFile::from_bytes(data.clone().into(), None).expect("seeds are models");
    let mut model = file.model.clone();
    for _ in 0..=random.below(3) {
        change(&mut model, random);
    }
    *data = model.encode_to_vec();
}

fn change(model: &mut ModelProto, random: &mut Random) {
    const OPERATORS: [&str; 16] = [
        "Softmax",
        "MatMul",
        "Reshape",
        "Transpose",
        "Mul",
        "Add",
        "Cast",
        "Einsum",
        "Gemm",
        "Conv",
        "Split",
        "Slice",
        "Gather",
        "Concat",
        "Shape",
        "Identity",
    ];
    let graph = model.graph.get_or_insert_default();
    let values: Vec<String> = graph
        .node
        .iter()
        .flat_map(|n| n.input.iter().chain(&n.output).cloned())
        .collect();
    let nodes = graph.node.len();
    let node = random.below(nodes);
    match random.below(12) {
        0 if nodes > 0 => drop(graph.node.remove(node)),
        1 if nodes > 0 => {
            let copy = graph.node[node].clone();
            graph.node.insert(random.below(nodes), copy);
        }
        2 if nodes > 0 => {
            graph.node.swap(node, random.below(nodes));
        }
        3 | 4 if nodes > 0 => {
            let inputs = graph.node[node].input.len();
            let (slot, value) = (random.below(inputs), random.pick(&values));
            if let (Some(input), Some(value)) = (graph.node[node].input.get_mut(slot), value) {
                *input = value;
            }
        }
        5 if nodes > 0 => {
            let operator = OPERATORS[random.below(OPERATORS.len())];
            graph.node[node].op_type = Some(operator.to_owned());
        }
        6 if nodes > 0 => {
            let attributes = &mut graph.node[node].attribute;
            let at = random.below(attributes.len());
            if let Some(attribute) = attributes.get_mut(at) {
                change_attribute(attribute, random);
            }
        }
        7 if nodes > 0 => {
            graph.node[node].input.pop();
        }
        8 | 9 => {
            let at = random.below(graph.initializer.len());
            if let Some(tensor) = graph.initializer.get_mut(at) {
                let axis = random.below(tensor.dims.len() + 1);
                match tensor.dims.get_mut(axis) {
                    Some(dim) => *dim = random.number(),
                    None => tensor.data_type = Some(random.below(20) as i32),
                }
            }
        }
        10 => {
            let at = random.below(graph.initializer.len());
            let integers =
                |t: &&mut linfusion_models::onnx::proto::TensorProto| t.data_type == Some(7);
            if let Some(tensor) = graph.initializer.iter_mut().skip(at).find(integers)
                && let Some(raw) = &tensor.raw_data
            {
                // The numbers that reshape, slice and gather.
                let mut raw = raw.to_vec();
                let from = random.below(raw.len() / 8) * 8;
                if let Some(bytes) = raw.get_mut(from..from + 8) {
                    bytes.copy_from_slice(&random.number().to_le_bytes());
                }
                tensor.raw_data = Some(raw.into());
            }
        }
        _ => {
            if let Some(import) = model.opset_import.first_mut() {
                import.version = Some(random.number());
            }
        }
    }
}

fn change_attribute(attribute: &mut AttributeProto, random: &mut Random) {
    let at = random.below(attribute.ints.len() + 1);
    match attribute.ints.get_mut(at) {
        Some(int) => *int = random.number(),
        None if attribute.s.is_some() => {
            attribute.s = Some(b"bhnm,->...x".to_vec().into());
        }
        None if random.below(2) == 0 => attribute.r#type = Some(random.below(14) as i32),
        None => attribute.i = Some(random.number()),
    }
}
