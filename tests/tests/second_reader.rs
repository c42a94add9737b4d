//! What we write, read by an independent implementation of the format.

use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_models::fixtures;
use linfusion_tests::request;
use onnx_protobuf::ModelProto;
use protobuf::Message;

#[test]
fn onnx_protobuf_reads_the_converted_model() {
    let folder = tempfile::tempdir().unwrap();
    let case = fixtures::path("sd15-tiny");
    let out = folder.path().join("unet.linfusion.onnx");
    convert(
        &request(
            &case.join("unet.onnx"),
            &out,
            WeightsFrom::Path(case.join("linfusion")),
        ),
        &mut |_| {},
    )
    .unwrap();
    let read = |path: &std::path::Path| {
        ModelProto::parse_from_bytes(&std::fs::read(path).unwrap()).unwrap()
    };
    let (before, after) = (read(&case.join("unet.onnx")), read(&out));

    let operators = after
        .graph
        .node
        .iter()
        .filter(|n| n.op_type == "LinFusionAttention")
        .count();
    assert_eq!(operators, 16);
    assert_eq!(after.functions.len(), 1);
    assert_eq!(after.functions[0].domain, "ai.linfusion");
    assert!(after.ir_version >= 8);
    assert!(after.metadata_props.iter().any(|p| p.key == "linfusion"));

    // Inputs, outputs and every parameter with a name of its own stay: users
    // feed the former and merge LoRAs by the latter.
    let names = |m: &ModelProto| -> Vec<String> {
        m.graph
            .input
            .iter()
            .chain(&m.graph.output)
            .map(|v| v.name.clone())
            .collect()
    };
    assert_eq!(names(&before), names(&after));
    let kept: std::collections::HashSet<&str> = after
        .graph
        .initializer
        .iter()
        .map(|t| t.name.as_str())
        .collect();
    let lost: Vec<&str> = before
        .graph
        .initializer
        .iter()
        .map(|t| t.name.as_str())
        .filter(|n| !n.starts_with("onnx::") && !n.contains("attn1") && !kept.contains(n))
        .collect();
    assert!(lost.is_empty(), "{lost:?}");
}
