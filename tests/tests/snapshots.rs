//! What a rewrite looks like, to be read in review: one site before and after, for
//! every exporter's way of writing attention.
//!
//! Everything that conversion changed in the file is in the snapshot, not only what
//! lies at the site. After a wanted change: `cargo insta review`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use linfusion_convert::analysis::Analysis;
use linfusion_convert::convert::{WeightsFrom, convert, inspect};
use linfusion_convert::patterns::Patterns;
use linfusion_convert::plan::Selection;
use linfusion_convert::rewrite::{Emit, emit};
use linfusion_models::checkpoint::synth::SynthOptions;
use linfusion_models::checkpoint::{MlpWidth, SiteAttention};
use linfusion_models::fixtures;
use linfusion_models::onnx::proto::{
    FunctionProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto,
};
use linfusion_models::onnx::{
    ElementType, OnnxFile, PrintOptions, make, print_model, print_node, text::Elided,
};
use linfusion_tests::{checkpoint_for, checkpoint_of, request, unpack};
use rstest::rstest;

#[rstest]
fn rewrite_of_an_export(
    #[values(
        "controlnet-ts17-dyn-sdpa",
        "pixel-ts17-dyn-einsum",
        "sd15-dynamo20-dyn-sdpa",
        "sd15-dynamo20-fix-sdpa",
        "sd15-dynamo23-fix-sdpa",
        "sd15-ts14-dyn-sdpa",
        "sd15-ts17-dyn-attn",
        "sd15-ts17-dyn-fused",
        "sd15-ts17-dyn-sdpa-fp16",
        "sd15-ts17-dyn-sdpa-int8",
        "sd15-ts17-fix-attn-ort",
        "sd15-ts17-fix-sdpa",
        "sd15-ts17-fix-sdpa-ort-fp16",
        "sd15-ts17-fix-sdpa-slim",
        "sd21-ts17-dyn-attn-fp16-upcast",
        "sd21-ts17-dyn-sdpa"
    )]
    name: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    let model = unpack(&format!("exports/{name}.onnx.gz"), folder.path()).unwrap();
    let weights = checkpoint_for(&model, folder.path(), MlpWidth::Width(4)).unwrap();
    let text = rewrite(&model, WeightsFrom::Path(weights), Emit::Function);
    insta::assert_snapshot!(format!("export-{name}"), text);
}

#[rstest]
fn rewrite_of_a_transformer(
    #[values(
        "dit-ts17-dyn-sdpa",
        "dit-ts17-dyn-sdpa-nbits",
        "flux-dynamo20-dyn-sdpa",
        "flux-dynamo23-dyn-sdpa",
        "pixart-dynamo20-dyn-sdpa",
        "pixart-ts17-dyn-sdpa",
        "pixart-ts17-fix-attn",
        "pixart-ts17-fix-sdpa-fp16",
        "pixart-ts17-fix-sdpa-ort",
        "sd3-ts17-dyn-sdpa",
        "sd3-ts17-dyn-sdpa-slim",
        "sd35-dynamo20-dyn-sdpa",
        "sit-dynamo23-fix-sdpa",
        "sit-ts17-dyn-sdpa"
    )]
    name: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.onnx");
    let packed = fixtures::bytes(&format!("transformers/{name}.onnx.gz")).unwrap();
    std::fs::write(&model, packed).unwrap();
    let hybrid = SiteAttention::Hybrid(None);
    let (mid, options) = (MlpWidth::Width(4), SynthOptions::default());
    let weights = checkpoint_of(&model, folder.path(), mid, hybrid, options).unwrap();
    let text = rewrite(&model, WeightsFrom::Path(weights), Emit::Function);
    insta::assert_snapshot!(format!("transformer-{name}"), text);
}

#[test]
fn no_export_lacks_a_snapshot() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    let text = fixtures::bytes("transformers/expected.json").unwrap();
    let transformers: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&text).unwrap();
    let transformers = transformers.keys().map(|n| format!("transformer-{n}"));
    let exports = fixtures::exports().unwrap().into_iter();
    let missing: Vec<String> = exports
        .map(|n| n.replace("exports/", "export-"))
        .chain(transformers)
        .map(|n| n.replace(".onnx.gz", ""))
        .filter(|n| !folder.join(format!("snapshots__{n}.snap")).exists())
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[rstest]
fn rewrite_with_an_official_checkpoint(
    #[values("sd15-tiny", "sdxl-tiny", "sd15-identity", "sd21-narrow")] case: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    let weights = fixtures::path(case).join("linfusion");
    let model = official(case, folder.path());
    let text = rewrite(&model, WeightsFrom::Path(weights), Emit::Function);
    insta::assert_snapshot!(format!("official-{case}"), text);
}

#[rstest]
#[case("standard", Emit::Standard)]
#[case("op", Emit::Op)]
fn rewrite_in_another_form(#[case] name: &str, #[case] emit: Emit) {
    let folder = tempfile::tempdir().unwrap();
    let model = official("sd15-tiny", folder.path());
    let text = rewrite(&model, WeightsFrom::Untrained, emit);
    insta::assert_snapshot!(format!("emit-{name}"), text);
}

#[rstest]
fn the_function(
    #[values(17, 20)] opset: i64,
    #[values(ElementType::F32, ElementType::F16)] element: ElementType,
) {
    let model = ModelProto {
        functions: vec![emit::linear_function(opset, element).unwrap()],
        ..ModelProto::default()
    };
    let text = print_model(&model, PrintOptions::default()).to_string();
    insta::assert_snapshot!(format!("function-{opset}-{element}"), text);
}

#[rstest]
fn inspect_table(#[values("sd15-tiny", "sdxl-tiny")] case: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut report = inspect(&official(case, folder.path()), &Selection::default()).unwrap();
    "unet.onnx".clone_into(&mut report.model);
    insta::assert_snapshot!(format!("inspect-{case}"), report.table());
}

#[test]
fn inspect_table_with_reasons() {
    let folder = tempfile::tempdir().unwrap();
    let model = unpack("exports/pixel-ts17-dyn-einsum.onnx.gz", folder.path()).unwrap();
    let selection = Selection {
        keep_every: Some(2),
        ..Selection::default()
    };
    let mut report = inspect(&model, &selection).unwrap();
    "unet.onnx".clone_into(&mut report.model);
    insta::assert_snapshot!("inspect-pixel-keep-every-2", report.table());
}

/// The model of a parity case, in `scratch`.
fn official(case: &str, scratch: &Path) -> PathBuf {
    let plain = format!("{case}/unet.onnx");
    let packed = format!("{plain}.gz");
    let name = if fixtures::path(&plain).exists() {
        plain
    } else {
        packed
    };
    let path = scratch.join("unet.onnx");
    std::fs::write(&path, fixtures::bytes(&name).unwrap()).unwrap();
    path
}

/// Converts the first self-attention of `model` and shows all that changed.
fn rewrite(model: &Path, weights: WeightsFrom, emit: Emit) -> String {
    let before = OnnxFile::open(model).unwrap();
    let analysis = Analysis::of(&before);
    let site = analysis.own_sites().next().unwrap();
    let module = site.module.clone().unwrap();
    let out = model.with_extension("converted.onnx");
    let mut job = request(model, &out, weights);
    job.selection.only = Some(Patterns::new("--only", std::slice::from_ref(&module)).unwrap());
    job.emit = emit;
    let report = convert(&job, &mut |_| {}).unwrap();
    assert_eq!(report.converted, 1);
    let after = OnnxFile::open(&out).unwrap();

    let exact = site.exact.as_ref().unwrap();
    let from = match (&site.plain, &exact.qkv) {
        (Ok(plain), _) => format!("{} ({:?})", plain.x, plain.x_layout),
        (_, Some(qkv)) => qkv
            .each_ref()
            .map(|r| format!("{} ({:?})", r.value, r.axes))
            .join(", "),
        _ => String::new(),
    };
    let mut text = format!(
        "site {}: {} heads × {}, scale {:.6}\nfrom {from} to {} ({:?})\n",
        site.index, exact.heads, exact.head_dim, exact.scale, exact.merged, exact.merged_layout
    );
    if let Ok(image) = &site.image {
        let size = image.grid.size;
        text += &format!(
            "image {} × {}, text {:?}\n",
            size.rows, size.cols, image.text
        );
    }
    text += &difference(&before, &after);
    let text = format!("@ = {module}\n{}", shorter(&text, &module));
    let lines = text.lines().count();
    assert!(lines <= 160, "{lines} lines are too many to read");
    text
}

/// The module's path as `@`, in the graph's spelling with slashes as `~`, that of
/// its parent as `^`; the exporter's `_output_0` left out.
fn shorter(text: &str, module: &str) -> String {
    let slashes = module.replace('.', "/");
    // `down_blocks.0` keeps its dot in node names.
    let mut spelled = String::new();
    for part in slashes.split('/') {
        let number = part.parse::<u32>().is_ok();
        spelled += if number { "." } else { "/" };
        spelled += part;
    }
    let parent = spelled.rsplit_once('/').map_or("", |(p, _)| p).to_owned();
    text.replace(&format!("/{module}"), "@")
        .replace(module, "@")
        .replace(&spelled, "~")
        .replace(&parent, "^")
        .replace("_output_0", "")
        .replace('"', "")
}

/// What only the old model has and what only the new one has, in file order.
fn difference(before: &OnnxFile, after: &OnnxFile) -> String {
    let mut text = String::new();
    let ((old, old_shapes), (new, new_shapes)) = (nodes(before), nodes(after));
    section(&mut text, "nodes", &old, &new);
    let (was, is) = (old_shapes.len(), new_shapes.len());
    let _ = writeln!(text, "\nshape arithmetic: {was} nodes before, {is} after");
    let kept = in_both(&old_shapes, &new_shapes);
    section(&mut text, "new shape arithmetic", &kept, &new_shapes);
    let (before, after) = (&before.model, &after.model);
    let tensors =
        |m: &ModelProto| -> Vec<String> { m.graph.initializer.iter().map(initializer).collect() };
    section(&mut text, "initializers", &tensors(before), &tensors(after));
    // Those of values that went are gone too; `check_model` finds any that are left.
    let new: Vec<String> = after.graph.value_info.iter().map(declared).collect();
    let old: Vec<String> = before.graph.value_info.iter().map(declared).collect();
    section(&mut text, "declared values", &in_both(&old, &new), &new);
    let ports = |m: &ModelProto| -> Vec<String> {
        let ports = m.graph.input.iter().chain(&m.graph.output);
        ports.map(declared).collect()
    };
    section(
        &mut text,
        "inputs and outputs",
        &ports(before),
        &ports(after),
    );
    section(&mut text, "opsets", &opsets(before), &opsets(after));
    section(
        &mut text,
        "functions",
        &functions(before),
        &functions(after),
    );
    text
}

fn in_both(old: &[String], new: &[String]) -> Vec<String> {
    let both = old.iter().filter(|line| new.contains(line));
    both.cloned().collect()
}

fn section(text: &mut String, title: &str, old: &[String], new: &[String]) {
    let (was, is): (BTreeSet<_>, BTreeSet<_>) = (old.iter().collect(), new.iter().collect());
    let gone = old.iter().filter(|l| !is.contains(l)).map(|l| ('-', l));
    let come = new.iter().filter(|l| !was.contains(l)).map(|l| ('+', l));
    let changed: Vec<_> = gone.chain(come).collect();
    if !changed.is_empty() {
        let _ = writeln!(text, "\n{title}");
    }
    for (sign, line) in changed {
        let _ = writeln!(text, "{sign} {line}");
    }
}

/// The nodes that compute with data, and those that compute shapes.
fn nodes(file: &OnnxFile) -> (Vec<String>, Vec<String>) {
    let constants = constants(&file.model);
    let analysis = Analysis::of(file);
    let is_arithmetic = |n: &NodeProto| {
        let integer = Some(ElementType::I64.onnx());
        let mut outputs = n.output.iter();
        outputs.all(|v| analysis.shapes.fact(v).element == integer)
    };
    let nodes = file.model.graph.node.iter();
    let nodes = nodes.filter(|n| !constants.contains_key(n.output[0].as_str()));
    let (arithmetic, data): (Vec<_>, Vec<_>) = nodes.partition(|n| is_arithmetic(n));
    let show = |nodes: Vec<&NodeProto>| nodes.into_iter().map(|n| node(n, &constants)).collect();
    (show(data), show(arithmetic))
}

fn opsets(model: &ModelProto) -> Vec<String> {
    let opset = |o: &OperatorSetIdProto| {
        let domain = o.domain.as_deref().unwrap_or("");
        format!("'{domain}' {}", o.version.unwrap_or(0))
    };
    model.opset_import.iter().map(opset).collect()
}

fn functions(model: &ModelProto) -> Vec<String> {
    let function = |f: &FunctionProto| {
        format!(
            "{}.{}({}), {} nodes",
            f.domain.as_deref().unwrap_or(""),
            f.name.as_deref().unwrap_or(""),
            f.input.join(", "),
            f.node.len()
        )
    };
    model.functions.iter().map(function).collect()
}

/// The values of `Constant` nodes, to be shown where they are read.
fn constants(model: &ModelProto) -> BTreeMap<&str, String> {
    let nodes = model.graph.node.iter();
    let nodes = nodes.filter(|n| n.op_type.as_deref() == Some("Constant"));
    nodes
        .map(|n| {
            let text = print_node(n, OPTIONS).to_string();
            let value = text.split_once("= Constant <").map_or("", |(_, v)| v);
            let value = value.trim_end_matches(" ()").trim_end_matches('>');
            let value = value.trim_start_matches("value: tensor = ");
            (n.output[0].as_str(), value.to_owned())
        })
        .collect()
}

const OPTIONS: PrintOptions<'_> = PrintOptions {
    max_elements: 8,
    elided: Elided::Size,
    file: None,
};

fn node(node: &NodeProto, constants: &BTreeMap<&str, String>) -> String {
    let input = |i: &String| constants.get(i.as_str()).unwrap_or(i).clone();
    let bare = NodeProto {
        name: None,
        input: node.input.iter().map(input).collect(),
        // The dynamo exporter's metadata holds whole stack traces.
        metadata_props: Vec::new(),
        doc_string: None,
        ..node.clone()
    };
    print_node(&bare, OPTIONS).to_string().replace('\n', " ")
}

fn initializer(tensor: &TensorProto) -> String {
    let name = tensor.name.as_deref().unwrap_or("");
    let element = ElementType::from_onnx(tensor.data_type.unwrap_or(0));
    let element = element.map_or("?".to_owned(), |e| e.to_string());
    format!("{name} {element}{:?}", tensor.dims)
}

fn declared(value: &ValueInfoProto) -> String {
    let name = value.name.as_deref().unwrap_or("");
    match make::tensor_type_of(value) {
        Some((element, Some(dims))) => format!("{name} {element}{dims:?}"),
        other => format!("{name} {other:?}"),
    }
}
