//! Verification of what was written: the structure by our own checker, and every
//! converted site by running it, cut out of the written model, on random input
//! against the reference in f64.

use std::collections::{HashMap, HashSet};

use buffa::Message;
use linfusion_models::checkpoint::{Checkpoint, CheckpointModule};
use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto};
use linfusion_models::onnx::{ElementType, OnnxFile, check_model, is_external, make};
use linfusion_models::random::SplitMix64;
use linfusion_ops::LinFusionAttentionAttrs;
use linfusion_ops::reference::linfusion_attention;
use linfusion_ops::schema::{DEFAULT_EPS, DOMAIN};
use linfusion_runtime::engine::{Engine, EngineError, Operators, Session, SessionOptions, library};
use linfusion_runtime::tensor::{DType, Tensor};
use ndarray::{Array2, ArrayD, IxDyn};
use serde::Serialize;

use crate::reference::Module;

/// How much to verify.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Verify {
    /// The structure, and every site's numbers if an engine is there and the
    /// site's input has at most 8 Mi elements.
    #[default]
    Auto,
    /// Nothing.
    Off,
    /// The structure and every site's numbers; an error where they cannot be had.
    Full,
}

/// Sites whose input has more elements are run only under [`Verify::Full`].
pub const MAX_ELEMENTS: usize = 1 << 23;

/// A converted site, as the rewrite recorded it.
#[derive(Clone, Debug, PartialEq)]
pub struct Converted {
    /// Module path.
    pub module: String,
    /// The site's input.
    pub x: String,
    /// Shape of x to run at.
    pub x_shape: Vec<i64>,
    /// x as `[B, N, C]`.
    pub tokens: String,
    /// q, k and v of the operator.
    pub qkv: [String; 3],
    /// The operator's output.
    pub attended: String,
    /// The value that the site makes.
    pub target: String,
    /// The out projection's result as `[B, N, C]`, where it was replaced, and
    /// whether its bias is in it.
    pub projected: Option<(String, bool)>,
    /// Heads.
    pub heads: i64,
    /// Element type of x.
    pub element: ElementType,
    /// Where its weights lie in the checkpoint, if they come from one.
    pub weights: Option<CheckpointModule>,
}

/// What verification found.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct Verified {
    /// What ran the sites; none: only the structure was checked.
    pub engine: Option<String>,
    /// Sites that were run.
    pub sites: usize,
    /// Sites that were not, and why.
    pub skipped: Vec<String>,
    /// The largest error of an attention output, relative to the largest
    /// magnitude in it.
    pub max_relative_error: f64,
}

/// Why a written model must not be published.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The structure is broken.
    #[error("the written model is not valid (a bug in the rewrite, please report it):\n  {}", .0.join("\n  "))]
    Structure(Vec<String>),
    /// A site computes something else.
    #[error(
        "{module}: {what} of the written site is off by {error:.2e} of its largest value, more than {bound:.2e} for {element} (run on {engine})"
    )]
    Numbers {
        /// The site.
        module: String,
        /// Which of its values.
        what: &'static str,
        /// Relative error found.
        error: f64,
        /// What rounding explains.
        bound: f64,
        /// Element type.
        element: String,
        /// Engine.
        engine: Engine,
    },
    /// A site makes infinities or NaN of finite input.
    #[error(
        "{module}: the written site makes infinite or NaN values of finite input (run on {engine})"
    )]
    NotFinite {
        /// The site.
        module: String,
        /// Engine.
        engine: Engine,
    },
    /// `--verify full` and no way to run a site.
    #[error("{module}: cannot be run: {reason}")]
    CannotRun {
        /// The site.
        module: String,
        /// Why.
        reason: String,
    },
}

/// Verifies `file`, a model with `sites` converted.
///
/// # Errors
/// [`VerifyError`].
pub fn verify(
    file: &OnnxFile,
    before: &HashSet<String>,
    sites: &[Converted],
    checkpoint: Option<&Checkpoint>,
    how: Verify,
    progress: &mut dyn FnMut(&str),
) -> Result<Verified, VerifyError> {
    if how == Verify::Off {
        return Ok(Verified::default());
    }
    structure(file, before)?;
    let mut verified = Verified::default();
    let engine = engine();
    verified.engine = Some(engine.to_string());
    for site in sites {
        progress(&site.module);
        let size = site.x_shape.iter().product::<i64>();
        if how == Verify::Auto && usize::try_from(size).map_or(true, |n| n > MAX_ELEMENTS) {
            verified.skipped.push(format!(
                "{}: an input of {size} elements (--verify full runs it)",
                site.module
            ));
            continue;
        }
        match run_site(file, site, checkpoint, engine) {
            Ok(error) => {
                verified.sites += 1;
                verified.max_relative_error = verified.max_relative_error.max(error);
            }
            Err(Failure::Wrong(e)) => return Err(*e),
            Err(Failure::CannotRun(reason)) if how == Verify::Full => {
                return Err(VerifyError::CannotRun {
                    module: site.module.clone(),
                    reason,
                });
            }
            Err(Failure::CannotRun(reason)) => {
                verified.skipped.push(format!("{}: {reason}", site.module))
            }
        }
    }
    Ok(verified)
}

/// Names of what the checker had to say of the original: a flaw that was there
/// before is not the rewrite's.
#[must_use]
pub fn known_problems(file: &OnnxFile) -> HashSet<String> {
    match check_model(&file.model, Some(file)) {
        Ok(_) => HashSet::new(),
        Err(problems) => problems.iter().map(ToString::to_string).collect(),
    }
}

/// The converted sites of a written model, from its operator nodes: each is cut
/// from its own q, k and v, which are run on random input. The second list names
/// those that cannot be read back.
#[must_use]
pub fn converted_sites(file: &OnnxFile) -> (Vec<Converted>, Vec<String>) {
    use linfusion_ops::schema::{ATTR_NUM_HEADS, LINFUSION_ATTENTION};
    let shapes = crate::shapes::Shapes::propagate(
        &file.model,
        &|t| file.tensor_bytes(t).ok(),
        &crate::shapes::Probe::TRACE,
    );
    let graph = crate::graph::Graph::new(&file.model.graph);
    let site = |n: &NodeProto| {
        let out = n.output.first()?;
        // v is a linear layer of x alone; x is what q, k and v have in common.
        let linear = *crate::attention::projection::roots(&graph, &shapes, n.input.get(2)?)
            .linears
            .first()?;
        Some(Converted {
            module: crate::graph::label(n)
                .trim_start_matches('/')
                .trim_end_matches("/LinFusionAttention")
                .trim_end_matches(crate::rewrite::site::SUFFIX)
                .to_owned(),
            x: linear.source.to_owned(),
            x_shape: shapes.shape(linear.source)?.to_vec(),
            tokens: linear.source.to_owned(),
            qkv: [
                n.input.first()?.clone(),
                n.input.get(1)?.clone(),
                n.input.get(2)?.clone(),
            ],
            attended: out.clone(),
            target: out.clone(),
            projected: None,
            heads: crate::graph::attr_int(n, ATTR_NUM_HEADS)?,
            element: ElementType::from_onnx(shapes.fact(linear.source).element?)?,
            weights: None,
        })
    };
    let (mut sites, mut unread) = (Vec::new(), Vec::new());
    for (_, node) in graph.nodes().filter(|(_, n)| {
        n.domain.as_deref() == Some(DOMAIN) && n.op_type.as_deref() == Some(LINFUSION_ATTENTION)
    }) {
        match site(node) {
            Some(site) => sites.push(site),
            None => unread.push(crate::graph::label(node).to_owned()),
        }
    }
    (sites, unread)
}

fn structure(file: &OnnxFile, before: &HashSet<String>) -> Result<(), VerifyError> {
    let Err(problems) = check_model(&file.model, Some(file)) else {
        return Ok(());
    };
    let new: Vec<String> = problems
        .iter()
        .map(ToString::to_string)
        .filter(|p| !before.contains(p))
        .take(8)
        .collect();
    if new.is_empty() {
        Ok(())
    } else {
        Err(VerifyError::Structure(new))
    }
}

/// ONNX Runtime if it is there, else tract.
fn engine() -> Engine {
    if !library::find(None).is_empty() && linfusion_runtime::engine::load_library(None).is_ok() {
        Engine::Ort
    } else {
        Engine::Tract
    }
}

enum Failure {
    Wrong(Box<VerifyError>),
    CannotRun(String),
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        // The first line says what; the rest is an engine's stack of contexts.
        Failure::CannotRun(
            error
                .to_string()
                .lines()
                .next()
                .unwrap_or_default()
                .to_owned(),
        )
    }
}

fn run_site(
    file: &OnnxFile,
    site: &Converted,
    checkpoint: Option<&Checkpoint>,
    engine: Engine,
) -> Result<f64, Failure> {
    let dtype = DType::from_onnx(site.element.onnx())
        .ok_or_else(|| Failure::CannotRun(format!("element type {}", site.element)))?;
    let model = cut(file, site).map_err(Failure::CannotRun)?;
    let bytes = model.encode_to_vec();
    // The function body, as any engine runs it; where the file has only the
    // operator, the operator.
    let has_body = (file.model.functions.iter()).any(|f| f.domain.as_deref() == Some(DOMAIN));
    let uses_operator = model
        .graph
        .node
        .iter()
        .any(|n| n.domain.as_deref() == Some(DOMAIN));
    let options = SessionOptions {
        operators: if uses_operator && !has_body {
            Operators::InProcess
        } else {
            Operators::None
        },
        ..SessionOptions::default()
    };
    let mut session = Session::from_bytes(engine, &bytes, &options)?;
    let shape: Option<Vec<usize>> = site
        .x_shape
        .iter()
        .map(|&d| usize::try_from(d).ok())
        .collect();
    let shape =
        shape.ok_or_else(|| Failure::CannotRun(format!("input shape {:?}", site.x_shape)))?;
    let x = Tensor::from_f64(noise(&shape), dtype);
    let mut outputs: HashMap<String, Tensor> = session
        .run(&[(site.x.as_str(), x.clone())])?
        .into_iter()
        .collect();
    outputs.insert(site.x.clone(), x);
    let get = |name: &String| {
        outputs
            .get(name)
            .map(Tensor::to_f64)
            .ok_or_else(|| Failure::CannotRun(format!("no output '{name}'")))
    };
    let [q, k, v] = [get(&site.qkv[0])?, get(&site.qkv[1])?, get(&site.qkv[2])?];
    let found = get(&site.attended)?;
    let attrs = LinFusionAttentionAttrs::new(site.heads, Some(DEFAULT_EPS))
        .map_err(|e| Failure::CannotRun(e.to_string()))?;
    let expected = linfusion_attention(q.view(), k.view(), v.view(), &attrs)
        .map_err(|e| Failure::CannotRun(e.to_string()))?;
    let wrong = |e| Failure::Wrong(Box::new(e));
    if outputs.values().any(|t| !t.is_finite()) {
        return Err(wrong(VerifyError::NotFinite {
            module: site.module.clone(),
            engine,
        }));
    }
    // q, k, v are exact here; what is left is fp32 accumulation over the tokens
    // and one rounding of the output. The error of a sum of n terms of one sign
    // grows at most with n·u, in practice with its root; 8 leaves room for the
    // quotient of two sums.
    let terms = expected.shape().get(1).copied().unwrap_or(1).max(1) as f64;
    let (accumulate, round) = epsilons(site.element);
    let bound = 8.0 * accumulate * terms.sqrt().max(4.0) + round;
    let judge = |what, error: f64, bound: f64| {
        // Written so that NaN fails.
        if error <= bound {
            return Ok(error);
        }
        Err(wrong(VerifyError::Numbers {
            module: site.module.clone(),
            what,
            error,
            bound,
            element: site.element.to_string(),
            engine,
        }))
    };
    let error = judge(
        "the attention",
        relative(found.iter().zip(&expected)),
        bound,
    )?;
    let (Some(checkpoint), Some(weights)) = (checkpoint, &site.weights) else {
        return Ok(error);
    };
    // The layers around the attention, against the checkpoint itself: they work
    // token by token, so some tokens tell.
    let module = Module::new(checkpoint, weights).map_err(|e| Failure::CannotRun(e.to_string()))?;
    let x = rows(&get(&site.tokens)?);
    let reference = module.project(x.view());
    // Up to a handful of layers, each rounding to the element type; weights were
    // rounded to it as well.
    let width = (x.ncols().max(1) as f64).sqrt();
    let bound = 8.0 * accumulate * width.max(4.0) + 16.0 * round;
    for (what, found, expected) in [
        ("q", &q, &reference.q),
        ("k", &k, &reference.k),
        ("v", &v, &reference.v),
    ] {
        judge(what, relative(rows(found).iter().zip(expected)), bound)?;
    }
    if let Some((value, bias)) = &site.projected {
        let expected = module.out(rows(&found).view(), *bias);
        let found = rows(&get(value)?);
        judge(
            "the out projection",
            relative(found.iter().zip(&expected)),
            bound,
        )?;
    }
    Ok(error)
}

/// Unit roundoff of sums (fp32, or fp64 in a graph of that) and of a stored value.
fn epsilons(element: ElementType) -> (f64, f64) {
    match element {
        ElementType::F64 => (f64::EPSILON, 0.0),
        ElementType::F16 => (f64::from(f32::EPSILON), half::f16::EPSILON.to_f64()),
        ElementType::Bf16 => (f64::from(f32::EPSILON), half::bf16::EPSILON.to_f64()),
        _ => (f64::from(f32::EPSILON), 0.0),
    }
}

/// The largest difference over the largest expected magnitude; NaN if any is.
fn relative<'a>(pairs: impl Iterator<Item = (&'a f64, &'a f64)>) -> f64 {
    let (mut error, mut largest) = (0.0f64, f64::MIN_POSITIVE);
    for (found, expected) in pairs {
        let difference = (found - expected).abs();
        if difference.is_nan() {
            return f64::NAN;
        }
        error = error.max(difference);
        largest = largest.max(expected.abs());
    }
    error / largest
}

/// Some rows of `[B, N, C]`, from all over it.
fn rows(value: &ArrayD<f64>) -> Array2<f64> {
    const ROWS: usize = 48;
    let width = value.shape().last().copied().unwrap_or(1).max(1);
    let total = value.len() / width;
    let step = total.div_ceil(ROWS).max(1);
    let picked = (0..total).step_by(step).flat_map(|row| {
        let start = row * width;
        start..start + width
    });
    // Outputs of a session are contiguous.
    let flat: Vec<f64> = value.iter().copied().collect();
    let values: Vec<f64> = picked.filter_map(|i| flat.get(i).copied()).collect();
    Array2::from_shape_vec((values.len() / width, width), values).unwrap_or_default()
}

/// The model of one site: from x to its operands and result.
fn cut(file: &OnnxFile, site: &Converted) -> Result<ModelProto, String> {
    let graph = &*file.model.graph;
    let producers: HashMap<&str, usize> = graph
        .node
        .iter()
        .enumerate()
        .flat_map(|(i, n)| n.output.iter().map(move |o| (o.as_str(), i)))
        .collect();
    let stored: HashMap<&str, usize> = graph
        .initializer
        .iter()
        .enumerate()
        .filter_map(|(i, t)| Some((t.name.as_deref()?, i)))
        .collect();
    let mut nodes = HashSet::new();
    let mut weights = HashSet::new();
    let wanted: Vec<&str> = site
        .qkv
        .iter()
        .chain([&site.attended, &site.target, &site.tokens])
        .chain(site.projected.iter().map(|(value, _)| value))
        .map(String::as_str)
        .collect();
    let mut queue = wanted.clone();
    while let Some(value) = queue.pop() {
        if value == site.x || value.is_empty() {
            continue;
        }
        if let Some(&i) = producers.get(value) {
            if nodes.insert(i) {
                queue.extend(graph.node[i].input.iter().map(String::as_str));
            }
        } else if let Some(&i) = stored.get(value) {
            weights.insert(i);
        } else {
            return Err(format!("it also reads the graph input '{value}'"));
        }
        if nodes.len() > 400 {
            return Err("it reaches far beyond its own nodes".to_owned());
        }
    }
    let sorted = |set: HashSet<usize>| {
        let mut v: Vec<usize> = set.into_iter().collect();
        v.sort_unstable();
        v
    };
    let node: Vec<NodeProto> = sorted(nodes)
        .into_iter()
        .map(|i| graph.node[i].clone())
        .collect();
    let mut initializer = Vec::new();
    for i in sorted(weights) {
        let mut tensor = graph.initializer[i].clone();
        if is_external(&tensor) {
            tensor.raw_data = Some(file.tensor_bytes(&tensor).map_err(|e| e.to_string())?);
            tensor.external_data.clear();
            tensor.data_location = None;
        }
        initializer.push(tensor);
    }
    let dims: Vec<make::Dim> = site.x_shape.iter().map(|&d| make::Dim::Fixed(d)).collect();
    let output = |name: &str| linfusion_models::onnx::proto::ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: buffa::MessageField::some(make::tensor_type(site.element, None)),
        ..Default::default()
    };
    let mut outputs: Vec<&str> = wanted;
    outputs.sort_unstable();
    outputs.dedup();
    outputs.retain(|o| *o != site.x);
    let sub = GraphProto {
        name: Some("site".to_owned()),
        node,
        initializer,
        input: vec![make::value_info(&site.x, site.element, &dims)],
        output: outputs.into_iter().map(output).collect(),
        ..GraphProto::default()
    };
    Ok(ModelProto {
        ir_version: file.model.ir_version,
        opset_import: file.model.opset_import.clone(),
        functions: file.model.functions.clone(),
        graph: buffa::MessageField::some(sub),
        ..ModelProto::default()
    })
}

/// Noise in −2 … 2, the same at every run.
fn noise(shape: &[usize]) -> ArrayD<f64> {
    let mut random = SplitMix64::new(0);
    ArrayD::from_shape_simple_fn(IxDyn(shape), || 2.0 * random.symmetric())
}
