//! Attention by attention: how far a converted model is from its original, each attention on the original's own activations.
//!
//! A converted graph keeps the names of all values outside of the attentions that it replaces. So the original gives the values
//! that go into an attention and the one that comes out; the converted model's nodes between them run alone on the
//! same values, and what they give is compared. Errors of earlier layers play no part.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use linfusion_models::graph::{Graph, NodeId, domain, tensor_name};
use linfusion_models::onnx::proto::NodeProto;
use linfusion_models::onnx::{ElementType, OnnxFile, ReadError};
use linfusion_models::shapes::Shapes;
use serde::Serialize;

use crate::engine::{Engine, EngineError, SessionOptions};
use crate::subgraph::{Cut, PartError, load, part, shapes};
use crate::tensor::Tensor;

/// The domain of the operators that replace attention.
const OPERATORS: &str = "ai.linfusion";
/// Bytes of activations that are held at once.
const BUDGET: u64 = 2 << 30;

/// How far one attention is from the original.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SiteDifference {
    /// Name of the operator's node, without its last part.
    pub site: String,
    /// The operators, as `LinFusionAttention`.
    pub operators: Vec<String>,
    /// Where it leads to: a value of both graphs.
    pub output: String,
    /// The value's shape.
    pub shape: Vec<usize>,
    /// Cosine of the angle between both outputs, as vectors of all values, over all samples.
    pub cosine: Option<f64>,
    /// ‖converted − original‖ / ‖original‖ over all samples.
    pub relative: Option<f64>,
}

/// Why attentions cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum SitesError {
    /// A model cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is none.
    #[error(
        "{path} has no operator of {OPERATORS}; give the original first and the converted model, written with --emit function \
         or op, second"
    )]
    None {
        /// The model.
        path: String,
    },
    /// The models don't belong together.
    #[error(
        "the attentions of {path} lead to no value that the original has: it was converted from another file"
    )]
    Strangers {
        /// The converted model.
        path: String,
    },
    /// A site's values cannot be told.
    #[error("site {site}: {problem}")]
    Site {
        /// The site.
        site: String,
        /// What is wrong.
        problem: String,
    },
    /// A part doesn't run.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The original doesn't run.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Compares every converted attention of `converted` with what `original` has there, on samples of the original's inputs.
///
/// # Errors
/// There is no such attention, the models don't belong together, or one doesn't run.
pub fn sites(
    original: &Path,
    converted: &Path,
    samples: &[Vec<(String, Tensor)>],
    engine: Engine,
    options: &SessionOptions,
) -> Result<Vec<SiteDifference>, SitesError> {
    let original = OnnxFile::open(original)?;
    let converted = OnnxFile::open(converted)?;
    let found = find(&original, &converted)?;
    let mut sums = vec![Sums::default(); found.len()];
    for sample in samples {
        let shapes = shapes(&original, sample);
        for group in groups(&found, &shapes) {
            let members: Vec<&Site> = group.iter().filter_map(|i| found.get(*i)).collect();
            let values = activations(&original, &shapes, &members, sample, engine, options)?;
            for (index, site) in group.iter().zip(members) {
                let theirs = run_site(&converted, &shapes, site, &values, engine, options)?;
                let ours = value(&values, site, &site.target)?;
                if let Some(sum) = sums.get_mut(*index) {
                    sum.add(site, ours, &theirs)?;
                }
            }
        }
    }
    Ok(found
        .into_iter()
        .zip(sums)
        .map(|(s, sum)| sum.of(s))
        .collect())
}

/// Whether `converted` has attentions to compare with `original`'s.
///
/// # Errors
/// It has none, or was converted from another model.
pub(super) fn check(original: &Path, converted: &Path) -> Result<(), SitesError> {
    find(&OnnxFile::open(original)?, &OnnxFile::open(converted)?).map(drop)
}

#[derive(Debug, Clone)]
struct Site {
    name: String,
    operators: Vec<String>,
    /// Values of both graphs that it reads.
    reads: Vec<String>,
    /// The value of both graphs that it leads to.
    target: String,
}

fn find(original: &OnnxFile, converted: &OnnxFile) -> Result<Vec<Site>, SitesError> {
    let path = || converted.path().display().to_string();
    let kept: HashSet<&str> = original
        .model
        .graph
        .node
        .iter()
        .flat_map(|n| n.output.iter().map(String::as_str))
        .chain(
            original
                .model
                .graph
                .input
                .iter()
                .filter_map(|v| v.name.as_deref()),
        )
        .filter(|name| !name.is_empty())
        .collect();
    let stored: HashSet<&str> = original
        .model
        .graph
        .initializer
        .iter()
        .map(tensor_name)
        .collect();
    let graph = Graph::new(&converted.model.graph);
    let mut by_target: BTreeMap<usize, Site> = BTreeMap::new();
    let mut any = false;
    for (id, node) in graph.nodes().filter(|(_, n)| domain(n) == OPERATORS) {
        any = true;
        let Some((place, target)) = target(&graph, id, &kept) else {
            continue;
        };
        let site = by_target.entry(place).or_insert_with(|| Site {
            name: site_name(node),
            operators: Vec::new(),
            reads: reads(&graph, target, &kept, &stored),
            target: target.to_owned(),
        });
        let kind = node.op_type.clone().unwrap_or_default();
        if !site.operators.contains(&kind) {
            site.operators.push(kind);
        }
    }
    if !any {
        return Err(SitesError::None { path: path() });
    }
    if by_target.is_empty() {
        return Err(SitesError::Strangers { path: path() });
    }
    Ok(by_target.into_values().collect())
}

/// The first value after a node that the original has too, and the position of the node that makes it.
fn target<'m>(graph: &Graph<'m>, from: NodeId, kept: &HashSet<&str>) -> Option<(usize, &'m str)> {
    let mut queue = std::collections::VecDeque::from([from]);
    let mut seen = HashSet::from([from]);
    while let Some(id) = queue.pop_front() {
        for output in &graph.proto.node.get(id.0)?.output {
            if kept.contains(output.as_str()) {
                return Some((id.0, output));
            }
            for reader in graph.readers(output) {
                if seen.insert(reader.node) {
                    queue.push_back(reader.node);
                }
            }
        }
    }
    None
}

/// Values of both graphs from which the new nodes compute `target`.
fn reads(
    graph: &Graph<'_>,
    target: &str,
    kept: &HashSet<&str>,
    stored: &HashSet<&str>,
) -> Vec<String> {
    let mut found = Vec::new();
    let mut queue = vec![target];
    let mut seen = HashSet::from([target]);
    while let Some(value) = queue.pop() {
        if value != target && kept.contains(value) && !stored.contains(value) {
            found.push(value.to_owned());
            continue;
        }
        let Some(port) = graph.producer(value) else {
            continue;
        };
        let node = graph.proto.node.get(port.node.0);
        for input in node.iter().flat_map(|n| &n.input) {
            if !input.is_empty() && seen.insert(input) {
                queue.push(input);
            }
        }
    }
    found.sort();
    found
}

fn site_name(node: &NodeProto) -> String {
    let name = node.name.as_deref().unwrap_or_default().trim_matches('/');
    let site = name.rsplit_once('/').map_or(name, |(site, _)| site);
    site.to_owned()
}

/// Sites whose values fit into the budget together.
fn groups(sites: &[Site], shapes: &Shapes) -> Vec<Vec<usize>> {
    let bytes = |site: &Site| -> u64 {
        let values = site.reads.iter().chain([&site.target]);
        let count = |name: &String| {
            let count = shapes.fact(name).count().unwrap_or(0);
            u64::try_from(count).unwrap_or(0).saturating_mul(4)
        };
        values.map(count).sum()
    };
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut taken = u64::MAX;
    for (index, site) in sites.iter().enumerate() {
        let more = bytes(site);
        taken = taken.saturating_add(more);
        if taken > BUDGET {
            groups.push(Vec::new());
            taken = more;
        }
        if let Some(group) = groups.last_mut() {
            group.push(index);
        }
    }
    groups
}

fn cut(shapes: &Shapes, site: &str, name: &str) -> Result<Cut, SitesError> {
    let element = shapes.fact(name).element.and_then(ElementType::from_onnx);
    element
        .map(|element| Cut {
            name: name.to_owned(),
            element,
            shape: shapes.shape(name).map(<[i64]>::to_vec),
        })
        .ok_or_else(|| SitesError::Site {
            site: site.to_owned(),
            problem: format!("the element type of `{name}` is not known"),
        })
}

/// The values of the original that the sites read and should give.
fn activations(
    original: &OnnxFile,
    shapes: &Shapes,
    sites: &[&Site],
    sample: &[(String, Tensor)],
    engine: Engine,
    options: &SessionOptions,
) -> Result<HashMap<String, Tensor>, SitesError> {
    let mut wanted: Vec<Cut> = Vec::new();
    let mut values: HashMap<String, Tensor> = HashMap::new();
    for site in sites {
        for name in site.reads.iter().chain([&site.target]) {
            if let Some((_, given)) = sample.iter().find(|(n, _)| n == name) {
                values.insert(name.clone(), given.clone());
            } else if !wanted.iter().any(|w| w.name == *name) {
                wanted.push(cut(shapes, &site.name, name)?);
            }
        }
    }
    let mut session = load(original, part(original, &[], &wanted), engine, options)?;
    let takes: HashSet<&str> = session.inputs().iter().map(|p| p.name.as_str()).collect();
    let inputs: Vec<(String, Tensor)> = sample
        .iter()
        .filter(|(name, _)| takes.contains(name.as_str()))
        .cloned()
        .collect();
    values.extend(session.run(&inputs)?);
    Ok(values)
}

fn value<'v>(
    values: &'v HashMap<String, Tensor>,
    site: &Site,
    name: &str,
) -> Result<&'v Tensor, SitesError> {
    values.get(name).ok_or_else(|| SitesError::Site {
        site: site.name.clone(),
        problem: format!("the original gives no `{name}`"),
    })
}

fn run_site(
    converted: &OnnxFile,
    shapes: &Shapes,
    site: &Site,
    values: &HashMap<String, Tensor>,
    engine: Engine,
    options: &SessionOptions,
) -> Result<Tensor, SitesError> {
    let fed: Vec<Cut> = site
        .reads
        .iter()
        .map(|name| cut(shapes, &site.name, name))
        .collect::<Result<_, _>>()?;
    let wanted = [cut(shapes, &site.name, &site.target)?];
    let mut session = load(converted, part(converted, &fed, &wanted), engine, options)?;
    let inputs: Vec<(String, Tensor)> = session
        .inputs()
        .iter()
        .map(|port| Ok((port.name.clone(), value(values, site, &port.name)?.clone())))
        .collect::<Result<_, SitesError>>()?;
    let mut outputs = session.run(&inputs)?;
    outputs
        .pop()
        .map(|(_, tensor)| tensor)
        .ok_or_else(|| SitesError::Site {
            site: site.name.clone(),
            problem: "it has no output".to_owned(),
        })
}

/// Sums over samples.
#[derive(Debug, Clone, Default)]
struct Sums {
    shape: Vec<usize>,
    original: f64,
    converted: f64,
    product: f64,
    error: f64,
}

impl Sums {
    fn add(
        &mut self,
        site: &Site,
        original: &Tensor,
        converted: &Tensor,
    ) -> Result<(), SitesError> {
        if original.shape() != converted.shape() {
            return Err(SitesError::Site {
                site: site.name.clone(),
                problem: format!(
                    "its output is {:?}, and {:?} in the original",
                    converted.shape(),
                    original.shape()
                ),
            });
        }
        self.shape = original.shape().to_vec();
        for (a, b) in original.to_f64().iter().zip(&converted.to_f64()) {
            self.original += a * a;
            self.converted += b * b;
            self.product += a * b;
            self.error += (b - a) * (b - a);
        }
        Ok(())
    }

    fn of(self, site: Site) -> SiteDifference {
        let finite = |value: f64| value.is_finite().then_some(value);
        SiteDifference {
            site: site.name,
            operators: site.operators,
            output: site.target,
            shape: self.shape,
            cosine: finite(self.product / (self.original * self.converted).sqrt()),
            relative: finite((self.error / self.original).sqrt()),
        }
    }
}
