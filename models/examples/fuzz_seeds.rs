//! Writes small models that use every part of the format, for the fuzzer to start
//! from: `cargo run -p linfusion-models --example fuzz_seeds FOLDER`.

use std::path::PathBuf;

use buffa::{Message, MessageField};
use linfusion_models::onnx::make::{self, Dim};
use linfusion_models::onnx::proto::{
    FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto,
    TrainingInfoProto,
};
use linfusion_models::onnx::{AttributeKind, ElementType};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args_os().nth(1).ok_or("needs a folder")?;
    let folder = PathBuf::from(folder);
    std::fs::create_dir_all(&folder)?;
    let seeds = [
        ("types", model(every_type())),
        ("external", model(vec![external()])),
        ("subgraphs", with_nodes(vec![branch(branch(add()))])),
        ("functions", functions()),
        ("rest", rest()),
    ];
    for (name, seed) in seeds {
        std::fs::write(
            folder.join(name).with_extension("onnx"),
            seed.try_encode_to_vec()?,
        )?;
    }
    Ok(())
}

fn model(initializer: Vec<TensorProto>) -> ModelProto {
    let dims = [Dim::Named("n".into()), Dim::Fixed(2), Dim::Unknown];
    ModelProto {
        ir_version: Some(10),
        opset_import: vec![make::opset("", 17), make::opset("d", 1)],
        graph: MessageField::some(GraphProto {
            name: Some("g".into()),
            node: vec![add()],
            initializer,
            input: vec![make::value_info("x", ElementType::F32, &dims)],
            output: vec![make::value_info("y", ElementType::F32, &dims)],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
}

fn add() -> NodeProto {
    make::node("Add", "add", &["x", "x"], &["y"], vec![])
}

fn with_nodes(node: Vec<NodeProto>) -> ModelProto {
    let mut model = model(Vec::new());
    model.graph.get_or_insert_default().node = node;
    model
}

fn branch(node: NodeProto) -> NodeProto {
    let body = GraphProto {
        name: Some("body".into()),
        output: vec![make::value_info("y", ElementType::F32, &[])],
        node: vec![node],
        ..GraphProto::default()
    };
    make::node(
        "If",
        "if",
        &["x"],
        &["y"],
        vec![make::graph_attribute("then_branch", body)],
    )
}

fn every_type() -> Vec<TensorProto> {
    let fixed = ElementType::ALL.into_iter().filter_map(|element| {
        let length = element.byte_len(&[3]).ok()??;
        Some(make::tensor(element.name(), element, &[3], vec![1; length]))
    });
    let typed = |element: ElementType| TensorProto {
        name: Some(format!("typed {element}")),
        data_type: Some(element.onnx()),
        dims: vec![2],
        ..TensorProto::default()
    };
    let mut all: Vec<TensorProto> = fixed.collect();
    all.push(TensorProto {
        float_data: vec![0.5; 2],
        ..typed(ElementType::F32)
    });
    all.push(TensorProto {
        int32_data: vec![7; 2],
        ..typed(ElementType::F16)
    });
    all.push(TensorProto {
        int32_data: vec![7; 2],
        ..typed(ElementType::F6E2M3)
    });
    all.push(TensorProto {
        int64_data: vec![7; 2],
        ..typed(ElementType::I64)
    });
    all.push(TensorProto {
        uint64_data: vec![7; 2],
        ..typed(ElementType::U32)
    });
    all.push(TensorProto {
        double_data: vec![7.0; 2],
        ..typed(ElementType::F64)
    });
    all.push(TensorProto {
        string_data: vec!["a".into(); 2],
        ..typed(ElementType::String)
    });
    all
}

fn external() -> TensorProto {
    TensorProto {
        name: Some("w".into()),
        data_type: Some(ElementType::F32.onnx()),
        dims: vec![4],
        data_location: Some(1),
        external_data: vec![
            make::metadata("location", "sub/w.bin"),
            make::metadata("offset", "4096"),
            make::metadata("length", "16"),
            make::metadata("checksum", "00"),
        ],
        ..TensorProto::default()
    }
}

fn functions() -> ModelProto {
    let function = |name: &str, callee: NodeProto| FunctionProto {
        name: Some(name.into()),
        domain: Some("d".into()),
        input: vec!["x".into()],
        output: vec!["y".into()],
        attribute: vec!["eps".into()],
        attribute_proto: vec![make::int("k", 1)],
        opset_import: vec![make::opset("", 17), make::opset("d", 1)],
        node: vec![callee],
        ..FunctionProto::default()
    };
    let eps = make::reference("eps", AttributeKind::Float, "eps");
    let call = |op: &str| make::node_in("d", op, "call", &["x"], &["y"], vec![eps.clone()]);
    let mut model = with_nodes(vec![call("F")]);
    model.functions = vec![function("F", call("G")), function("G", add())];
    model
}

/// Every kind of attribute, sparse tensors, training graphs, metadata.
fn rest() -> ModelProto {
    let mut node = add();
    node.attribute = vec![
        make::int("i", -1),
        make::float("f", 0.5),
        make::string("s", "a\"b"),
        make::ints("is", &[1, 2]),
        make::floats("fs", &[0.5]),
        make::tensor_attribute("t", make::tensor_i64("t", &[1], &[1])),
    ];
    node.metadata_props = vec![make::metadata("k", "v")];
    let mut model = with_nodes(vec![node]);
    model.metadata_props = vec![make::metadata("k", "v")];
    let graph = model.graph.get_or_insert_default();
    graph.sparse_initializer = vec![SparseTensorProto {
        values: MessageField::some(make::tensor_f32("sparse", &[1], &[1.0])),
        indices: MessageField::some(make::tensor_i64("", &[1], &[2])),
        dims: vec![4],
        ..SparseTensorProto::default()
    }];
    graph.value_info = vec![make::value_info("v", ElementType::Bf16, &[Dim::Fixed(-1)])];
    let training = TrainingInfoProto {
        initialization: MessageField::some(GraphProto::default()),
        ..TrainingInfoProto::default()
    };
    model.training_info = vec![training];
    model
}
