//! Graphs that are attention, and graphs that almost are: what is converted, and
//! the reason where not.

use linfusion_convert::analysis::Analysis;
use linfusion_convert::attention::kind::Kind;
use linfusion_convert::attention::site::Site;
use linfusion_models::onnx::make::{
    Dim, int, ints, node, opset, string, tensor_f32, tensor_i64, value_info,
};
use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto, TensorProto};
use linfusion_models::onnx::{ElementType, OnnxFile};

const TOKENS: i64 = 6;
const WIDTH: i64 = 8;
const HEADS: i64 = 2;

/// A site of two heads over x `[2, 6, 8]`, in the words of its nodes, so that a
/// test can change one of them.
struct Sketch {
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
    opset: i64,
    /// Stored tensors that are inputs as well.
    defaults: Vec<&'static str>,
}

impl Sketch {
    fn new() -> Self {
        let weight = |name: &str| tensor_f32(name, &[WIDTH, WIDTH], &[0.1; 64]);
        let mut initializers: Vec<TensorProto> = ["wq", "wk", "wv", "wo"].map(weight).to_vec();
        initializers.push(tensor_i64("split", &[4], &[0, 0, HEADS, WIDTH / HEADS]));
        initializers.push(tensor_i64("merge", &[3], &[0, 0, WIDTH]));
        initializers.push(tensor_f32("scale", &[], &[0.5]));
        initializers.push(tensor_f32("zeros", &[1, 1, TOKENS, TOKENS], &[0.0; 36]));
        initializers.push(tensor_f32("ones", &[1, 1, TOKENS, TOKENS], &[1.0; 36]));
        let mut nodes = Vec::new();
        for (p, perm) in [
            ("q", [0, 2, 1, 3]),
            ("k", [0, 2, 3, 1]),
            ("v", [0, 2, 1, 3]),
        ] {
            let n = |s: &str| format!("{p}{s}");
            nodes.push(node(
                "MatMul",
                &n("_proj"),
                &["x", &format!("w{p}")],
                &[&n("1")],
                vec![],
            ));
            nodes.push(node(
                "Reshape",
                &n("_split"),
                &[&n("1"), "split"],
                &[&n("2")],
                vec![],
            ));
            nodes.push(node(
                "Transpose",
                &n("_turn"),
                &[&n("2")],
                &[&n("3")],
                vec![ints("perm", &perm)],
            ));
        }
        nodes.push(node("MatMul", "scores", &["q3", "k3"], &["s1"], vec![]));
        nodes.push(node("Mul", "scaled", &["s1", "scale"], &["s2"], vec![]));
        nodes.push(node(
            "Softmax",
            "softmax",
            &["s2"],
            &["p"],
            vec![int("axis", -1)],
        ));
        nodes.push(node("MatMul", "weighted", &["p", "v3"], &["o1"], vec![]));
        nodes.push(node(
            "Transpose",
            "turn",
            &["o1"],
            &["o2"],
            vec![ints("perm", &[0, 2, 1, 3])],
        ));
        nodes.push(node("Reshape", "join", &["o2", "merge"], &["o3"], vec![]));
        nodes.push(node("MatMul", "out", &["o3", "wo"], &["y"], vec![]));
        Sketch {
            nodes,
            initializers,
            opset: 17,
            defaults: Vec::new(),
        }
    }

    fn at(&mut self, name: &str) -> &mut NodeProto {
        self.nodes
            .iter_mut()
            .find(|n| n.name.as_deref() == Some(name))
            .expect("a node of the sketch")
    }

    fn input(&mut self, name: &str, slot: usize, value: &str) -> &mut Self {
        self.at(name).input[slot] = value.to_owned();
        self
    }

    fn perm(&mut self, name: &str, perm: &[i64]) -> &mut Self {
        self.at(name).attribute = vec![ints("perm", perm)];
        self
    }

    fn before(&mut self, name: &str, new: NodeProto) -> &mut Self {
        let at = self
            .nodes
            .iter()
            .position(|n| n.name.as_deref() == Some(name))
            .expect("a node of the sketch");
        self.nodes.insert(at, new);
        self
    }

    /// Kind, whether it is convertible, and the reason if not.
    fn read(&self) -> (Kind, Option<String>) {
        self.with_site(|site| (site.kind, site.plain.as_ref().err().cloned()))
    }

    fn with_site<T>(&self, look: impl FnOnce(&Site<'_>) -> T) -> T {
        let dims = [2, TOKENS, WIDTH].map(Dim::Fixed);
        let x = |name| value_info(name, ElementType::F32, &dims);
        let graph = GraphProto {
            name: Some("sketch".to_owned()),
            node: self.nodes.clone(),
            initializer: self.initializers.clone(),
            input: [x("x"), x("context"), value_info("t", ElementType::F32, &[])]
                .into_iter()
                .chain(self.defaults.iter().map(|n| {
                    let mask = [1, 1, TOKENS, TOKENS].map(Dim::Fixed);
                    value_info(n, ElementType::F32, &mask)
                }))
                .collect(),
            output: vec![x("y")],
            ..GraphProto::default()
        };
        let model = ModelProto {
            ir_version: Some(8),
            opset_import: vec![opset("", self.opset)],
            graph: graph.into(),
            ..ModelProto::default()
        };
        let bytes = buffa_bytes(&model);
        let file = OnnxFile::from_bytes(bytes.into(), None).expect("the sketch is a model");
        let analysis = Analysis::of(&file);
        let [site] = &analysis.sites[..] else {
            panic!("{} sites", analysis.sites.len())
        };
        look(site)
    }
}

fn buffa_bytes(model: &ModelProto) -> Vec<u8> {
    use buffa::Message;
    model.encode_to_vec()
}

fn convertible(change: impl FnOnce(&mut Sketch)) {
    let mut sketch = Sketch::new();
    change(&mut sketch);
    assert_eq!(sketch.read(), (Kind::SelfAttention, None));
}

fn kept(kind: Kind, says: &str, change: impl FnOnce(&mut Sketch)) {
    let mut sketch = Sketch::new();
    change(&mut sketch);
    let (found, reason) = sketch.read();
    let reason = reason.expect("it must be kept");
    assert_eq!(found, kind, "{reason}");
    assert!(reason.contains(says), "'{says}' is not in: {reason}");
}

#[test]
fn plain_attention_is_convertible() {
    convertible(|_| {});
}

#[test]
fn a_mask_of_zeros_means_nothing() {
    convertible(|s| {
        s.before(
            "softmax",
            node("Add", "mask", &["s2", "zeros"], &["s3"], vec![]),
        );
        s.input("softmax", 0, "s3");
    });
}

#[test]
fn a_mask_of_zeros_as_first_operand_means_nothing() {
    convertible(|s| {
        s.before(
            "softmax",
            node("Add", "mask", &["zeros", "s2"], &["s3"], vec![]),
        );
        s.input("softmax", 0, "s3");
    });
}

#[test]
fn a_tensor_times_zero_means_nothing() {
    convertible(|s| {
        s.initializers.push(tensor_f32("nought", &[], &[0.0]));
        s.before(
            "softmax",
            node("Mul", "beta", &["ones", "nought"], &["z"], vec![]),
        );
        s.before(
            "softmax",
            node("Add", "mask", &["s2", "z"], &["s3"], vec![]),
        );
        s.input("softmax", 0, "s3");
    });
}

#[test]
fn a_mask_that_means_something_is_kept() {
    kept(Kind::SelfAttention, "mask or bias 'ones'", |s| {
        s.before(
            "softmax",
            node("Add", "mask", &["s2", "ones"], &["s3"], vec![]),
        );
        s.input("softmax", 0, "s3");
    });
}

#[test]
fn keys_of_another_tensor_are_cross_attention() {
    kept(Kind::Cross, "another tensor", |s| {
        s.input("k_proj", 0, "context")
            .input("v_proj", 0, "context");
    });
}

#[test]
fn values_alone_of_another_tensor_are_not_understood() {
    kept(Kind::Other, "not all projected", |s| {
        s.input("v_proj", 0, "context");
    });
}

#[test]
fn heads_that_are_split_the_other_way_round_are_taken_by_columns() {
    // [B, N, D, H]: the head is the fastest axis of q, k and v, but not of the
    // merged output. Unusual, and attention all the same: the rewrite gathers the
    // columns (`properties.rs` runs it).
    convertible(|s| {
        for p in ["q", "k", "v"] {
            s.initializers
                .retain(|t| t.name.as_deref() != Some("split"));
            let perm: &[i64] = if p == "k" {
                &[0, 3, 2, 1]
            } else {
                &[0, 3, 1, 2]
            };
            s.perm(&format!("{p}_turn"), perm);
        }
        s.initializers
            .push(tensor_i64("split", &[4], &[0, 0, WIDTH / HEADS, HEADS]));
    });
}

#[test]
fn softmax_over_queries_is_no_attention() {
    kept(Kind::Other, "axis 2", |s| {
        s.at("softmax").attribute = vec![int("axis", 2)];
    });
}

#[test]
fn attention_weights_that_somebody_else_reads_are_kept() {
    kept(Kind::Other, "read by 2 nodes", |s| {
        s.nodes
            .push(node("Relu", "probe", &["p"], &["probe"], vec![]));
    });
}

#[test]
fn something_between_projection_and_product_is_kept_by_name() {
    kept(Kind::SelfAttention, "Relu 'odd'", |s| {
        s.before("scores", node("Relu", "odd", &["q3"], &["q4"], vec![]));
        s.input("scores", 0, "q4");
    });
}

#[test]
fn scaled_values_are_kept() {
    kept(Kind::SelfAttention, "is scaled by 0.5", |s| {
        s.before(
            "weighted",
            node("Mul", "odd", &["v3", "scale"], &["v4"], vec![]),
        );
        s.input("weighted", 1, "v4");
    });
}

#[test]
fn an_einsum_is_read_by_its_letters() {
    convertible(|s| {
        s.perm("k_turn", &[0, 2, 1, 3]);
        let scores = s.at("scores");
        scores.op_type = Some("Einsum".to_owned());
        scores.attribute = vec![string("equation", "bhid,bhjd->bhij")];
    });
}

#[test]
fn an_einsum_over_the_wrong_letter_is_no_product_of_queries_and_keys() {
    kept(Kind::Other, "not of a product", |s| {
        s.perm("k_turn", &[0, 2, 1, 3]);
        let scores = s.at("scores");
        scores.op_type = Some("Einsum".to_owned());
        // Sums over the query: what is left is indexed by channel.
        scores.attribute = vec![string("equation", "bhid,bhjd->bhj")];
    });
}

#[test]
fn a_scale_that_only_the_caller_knows_is_kept() {
    kept(Kind::SelfAttention, "known at run time only", |s| {
        s.input("scaled", 1, "t");
    });
}

#[test]
fn a_mask_that_the_caller_may_replace_is_kept() {
    kept(Kind::SelfAttention, "'zeros' is added", |s| {
        s.defaults.push("zeros");
        s.before(
            "softmax",
            node("Add", "mask", &["s2", "zeros"], &["s3"], vec![]),
        );
        s.input("softmax", 0, "s3");
    });
}

fn clip(s: &mut Sketch, bound: f32) {
    s.initializers.push(tensor_f32("low", &[], &[-bound]));
    s.initializers.push(tensor_f32("high", &[], &[bound]));
    let clip = node("Clip", "clip", &["s2", "low", "high"], &["s3"], vec![]);
    s.before("softmax", clip).input("softmax", 0, "s3");
}

#[test]
fn scores_that_are_clipped_are_kept() {
    kept(Kind::SelfAttention, "clipped by 'clip'", |s| clip(s, 50.0));
}

#[test]
fn a_clip_at_the_ends_of_a_type_means_nothing() {
    convertible(|s| clip(s, 65504.0));
}

fn replaced_where_nan(s: &mut Sketch, of: &str) {
    s.initializers.push(tensor_f32("nought", &[], &[0.0]));
    s.before("weighted", node("IsNaN", "asks", &[of], &["bad"], vec![]));
    let replace = node("Where", "replace", &["bad", "nought", "p"], &["p2"], vec![]);
    s.before("weighted", replace).input("weighted", 0, "p2");
}

#[test]
fn zeros_for_rows_of_nan_mean_nothing() {
    convertible(|s| replaced_where_nan(s, "p"));
}

#[test]
fn attention_weights_that_are_masked_are_kept() {
    kept(Kind::Other, "followed by Where 'replace'", |s| {
        replaced_where_nan(s, "s2");
    });
}

#[test]
fn a_softmax_over_queries_and_keys_together_is_kept() {
    kept(Kind::Other, "folds the rows", |s| {
        s.initializers.push(tensor_i64("flat", &[3], &[0, 0, -1]));
        let square = [0, 0, TOKENS, TOKENS];
        s.initializers.push(tensor_i64("square", &[4], &square));
        s.before(
            "softmax",
            node("Reshape", "fold", &["s2", "flat"], &["s3"], vec![]),
        );
        s.input("softmax", 0, "s3");
        s.before(
            "weighted",
            node("Reshape", "unfold", &["p", "square"], &["p2"], vec![]),
        );
        s.input("weighted", 0, "p2");
    });
}

#[test]
fn before_opset_13_a_softmax_without_axis_is_not_over_the_last() {
    kept(Kind::Other, "over axis 1", |s| {
        s.opset = 12;
        s.at("softmax").attribute.clear();
    });
}

/// What the rewrite would replace, and why it would not, after a bias was put
/// below the out projection through `between`.
fn out_projection(between: &[(&str, &str)], observed: bool) -> (String, Option<String>) {
    let mut s = Sketch::new();
    s.initializers.push(tensor_f32("bo", &[WIDTH], &[0.1; 8]));
    s.initializers.push(tensor_i64("rows", &[2], &[-1, WIDTH]));
    s.at("out").output = vec!["product".to_owned()];
    let mut value = "product".to_owned();
    for (op, with) in between {
        let next = format!("{value}_{op}");
        let inputs: Vec<&str> = [value.as_str(), *with]
            .into_iter()
            .filter(|v| !v.is_empty())
            .collect();
        s.nodes.push(node(op, &next, &inputs, &[&next], vec![]));
        value = next;
    }
    if observed {
        s.nodes
            .push(node("Relu", "probe", &["product"], &["probed"], vec![]));
    }
    s.nodes
        .push(node("Add", "bias", &[&value, "bo"], &["y"], vec![]));
    s.with_site(|site| {
        let out = site.plain.as_ref().unwrap().out.as_ref().unwrap();
        (out.result.to_owned(), out.obstacle.clone())
    })
}

#[test]
fn the_out_projections_bias_belongs_to_it() {
    assert_eq!(out_projection(&[], false), ("y".to_owned(), None));
    assert_eq!(
        out_projection(&[("Identity", "")], false),
        ("y".to_owned(), None)
    );
}

#[test]
fn an_out_projection_whose_bias_stands_apart_is_not_replaced() {
    for (between, observed, says) in [
        (&[("Reshape", "rows")][..], false, "elements are moved"),
        (&[][..], true, "something else reads the product"),
    ] {
        let (_, obstacle) = out_projection(between, observed);
        let obstacle = obstacle.expect(says);
        assert!(obstacle.contains(says), "{obstacle}");
    }
}
