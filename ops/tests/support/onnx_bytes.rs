//! Just enough protobuf to write a model with one node of our domain, with or without its
//! function body: this crate stays free of a protobuf library.

use linfusion_ops::body::{
    AttributeValue, BodyAttribute, BodyFunction, BodyNode, GraphValue, RefKind,
};
use linfusion_ops::schema::{
    DOMAIN, INPUT_NAMES, LINFUSION_ATTENTION, OPSET_VERSION, WINDOW_ATTENTION, WINDOW_INPUT_NAMES,
};
use linfusion_ops::{ElementType, Layout};

/// How the operator stands in the model.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// The node alone.
    Op,
    /// The node and the model-local function.
    #[allow(dead_code, reason = "the benchmark doesn't build it")]
    Function(BodyFunction),
    /// The body's nodes in place of the node.
    Inlined(BodyFunction),
    /// Another operator with the same inputs, output and `num_heads`.
    #[allow(dead_code, reason = "only the benchmark builds it")]
    Other {
        /// Its type.
        op_type: String,
        /// Its domain, at version 1.
        domain: String,
    },
}

/// Which operator, and the attributes of its node.
#[derive(Debug, Clone, PartialEq)]
pub enum Site {
    /// `LinFusionAttention`.
    #[allow(dead_code, reason = "not everyone who writes models has it")]
    Linear {
        /// Attribute `eps`, if the node has one.
        eps: Option<f32>,
    },
    /// `WindowAttention`, with an input `grid` after q, k and v.
    #[allow(dead_code, reason = "not everyone who writes models has windows")]
    Window {
        /// All attributes but `num_heads`.
        attributes: Vec<BodyAttribute>,
    },
}

impl Site {
    fn op_type(&self) -> &'static str {
        match self {
            Self::Linear { .. } => LINFUSION_ATTENTION,
            Self::Window { .. } => WINDOW_ATTENTION,
        }
    }

    fn inputs(&self) -> &'static [&'static str] {
        match self {
            Self::Linear { .. } => &INPUT_NAMES,
            Self::Window { .. } => &WINDOW_INPUT_NAMES,
        }
    }

    fn attributes(&self) -> Vec<BodyAttribute> {
        match self {
            Self::Linear { eps } => eps
                .map(|eps| BodyAttribute {
                    name: "eps".into(),
                    value: AttributeValue::Float(eps),
                })
                .into_iter()
                .collect(),
            Self::Window { attributes } => attributes.clone(),
        }
    }
}

/// A model with the operator's inputs and the output out; every dimension but the widths is
/// symbolic.
#[derive(Debug, Clone, PartialEq)]
pub struct OneNode {
    /// The default domain's opset.
    pub opset: i64,
    /// Memory layout.
    pub layout: Layout,
    /// Element type of all four tensors.
    pub element: ElementType,
    /// Attribute `num_heads`.
    pub heads: i64,
    /// Which operator.
    pub site: Site,
    /// D and Dv.
    pub widths: [usize; 2],
    /// How the operator stands in it.
    pub form: Form,
}

#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
    fn int(mut self, field: u64, value: i64) -> Self {
        self.varint(field << 3);
        self.varint(value as u64);
        self
    }
    fn float(mut self, field: u64, value: f32) -> Self {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }
    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }
    fn text(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }
    fn message(self, field: u64, value: Message) -> Self {
        self.bytes(field, &value.0)
    }
    fn each<T>(self, items: &[T], add: impl FnMut(Self, &T) -> Self) -> Self {
        items.iter().fold(self, add)
    }
}

fn tensor(data_type: i64, dims: &[i64], raw: Vec<u8>) -> Message {
    Message::default()
        .each(dims, |m, &d| m.int(1, d))
        .int(2, data_type)
        .bytes(9, &raw)
}

fn attribute(attribute: &BodyAttribute) -> Message {
    let m = Message::default().text(1, &attribute.name);
    let raw = |bytes: Vec<[u8; 8]>| bytes.concat();
    match &attribute.value {
        AttributeValue::Int(i) => m.int(3, *i).int(20, 2),
        AttributeValue::Ints(v) => m.each(v, |m, &i| m.int(8, i)).int(20, 7),
        AttributeValue::Float(f) => m.float(2, *f).int(20, 1),
        AttributeValue::String(s) => m.text(4, s).int(20, 3),
        AttributeValue::TensorF32 { dims, data } => {
            let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
            m.message(5, tensor(1, dims, bytes)).int(20, 4)
        }
        AttributeValue::TensorF64 { dims, data } => {
            let bytes = raw(data.iter().map(|x| x.to_le_bytes()).collect());
            m.message(5, tensor(11, dims, bytes)).int(20, 4)
        }
        AttributeValue::TensorI64 { dims, data } => {
            let bytes = raw(data.iter().map(|x| x.to_le_bytes()).collect());
            m.message(5, tensor(7, dims, bytes)).int(20, 4)
        }
        AttributeValue::Graph(body) => {
            let value = |m: Message, v: &GraphValue| {
                let shape =
                    (0..v.rank).fold(Message::default(), |m, _| m.message(1, Message::default()));
                let tensor = Message::default()
                    .int(1, i64::from(v.element))
                    .message(2, shape);
                let info = Message::default()
                    .text(1, &v.name)
                    .message(2, Message::default().message(1, tensor));
                (m, info)
            };
            let graph = Message::default()
                .each(&body.nodes, |m, n| m.message(1, node(n, "", "")))
                .text(2, "body")
                .each(&body.inputs, |m, v| {
                    let (m, info) = value(m, v);
                    m.message(11, info)
                })
                .each(&body.outputs, |m, v| {
                    let (m, info) = value(m, v);
                    m.message(12, info)
                });
            m.message(6, graph).int(20, 5)
        }
        AttributeValue::Ref { attribute, kind } => {
            let kind = match kind {
                RefKind::Int => 2,
                RefKind::Ints => 7,
                RefKind::Float => 1,
            };
            m.text(21, attribute).int(20, kind)
        }
    }
}

fn node(node: &BodyNode, name: &str, domain: &str) -> Message {
    Message::default()
        .each(&node.inputs, |m, s| m.text(1, s))
        .each(&node.outputs, |m, s| m.text(2, s))
        .text(3, name)
        .text(4, &node.op_type)
        .each(&node.attributes, |m, a| m.message(5, attribute(a)))
        .text(7, domain)
}

fn opset_import(domain: &str, version: i64) -> Message {
    Message::default().text(1, domain).int(2, version)
}

fn function(f: &BodyFunction, opset: i64) -> Message {
    let mut m = Message::default()
        .text(1, &f.name)
        .each(&f.inputs, |m, s| m.text(4, s))
        .each(&f.outputs, |m, s| m.text(5, s));
    for a in &f.attributes {
        m = match &a.default {
            None => m.text(6, &a.name),
            Some(value) => {
                let value = value.clone();
                let name = a.name.clone();
                m.message(11, attribute(&BodyAttribute { name, value }))
            }
        };
    }
    m.each(&f.nodes, |m, n| m.message(7, node(n, "", "")))
        .message(9, opset_import("", opset))
        .text(10, DOMAIN)
}

fn value_info(name: &str, element: i32, dims: &[Dim]) -> Message {
    let shape = Message::default().each(dims, |m, d| {
        m.message(
            1,
            match d {
                Dim::Value(v) => Message::default().int(1, *v as i64),
                Dim::Symbol(s) => Message::default().text(2, s),
            },
        )
    });
    let tensor = Message::default()
        .int(1, i64::from(element))
        .message(2, shape);
    Message::default()
        .text(1, name)
        .message(2, Message::default().message(1, tensor))
}

/// `TensorProto.INT64`.
const INT64: i32 = 7;

enum Dim {
    Value(usize),
    Symbol(&'static str),
}

impl OneNode {
    /// The bytes of the `ModelProto`.
    pub fn encode(&self) -> Vec<u8> {
        let heads = self.heads.max(0) as usize;
        let dims = |rows: &'static str, width: usize| match self.layout {
            Layout::Packed => vec![
                Dim::Symbol("batch"),
                Dim::Symbol(rows),
                Dim::Value(heads * width),
            ],
            Layout::Heads => vec![
                Dim::Symbol("batch"),
                Dim::Value(heads),
                Dim::Symbol(rows),
                Dim::Value(width),
            ],
        };
        let [d, dv] = self.widths;
        let element = self.element.onnx_code();
        let mut attributes = vec![BodyAttribute {
            name: "num_heads".into(),
            value: AttributeValue::Int(self.heads),
        }];
        let (op_type, domain, inputs) = match &self.form {
            Form::Other { op_type, domain } => {
                (op_type.as_str(), domain.as_str(), &INPUT_NAMES[..])
            }
            _ => {
                attributes.extend(self.site.attributes());
                (self.site.op_type(), DOMAIN, self.site.inputs())
            }
        };
        let site = BodyNode {
            op_type: op_type.into(),
            inputs: inputs.iter().map(|&s| s.into()).collect(),
            outputs: vec!["out".into()],
            attributes,
        };
        let mut graph = Message::default();
        graph = match &self.form {
            Form::Inlined(body) => graph.each(&body.nodes, |m, n| m.message(1, node(n, "", ""))),
            _ => graph.message(1, node(&site, "the_site", domain)),
        };
        graph = graph
            .text(2, "one_node")
            .message(11, value_info("q", element, &dims("queries", d)))
            .message(11, value_info("k", element, &dims("keys", d)))
            .message(11, value_info("v", element, &dims("keys", dv)));
        if inputs.len() == WINDOW_INPUT_NAMES.len() {
            graph = graph.message(11, value_info("grid", INT64, &[Dim::Value(2)]));
        }
        graph = graph.message(12, value_info("out", element, &dims("queries", dv)));
        let mut model = Message::default()
            .int(1, 8)
            .text(2, "linfusion-ops tests")
            .message(7, graph)
            .message(8, opset_import("", self.opset));
        if !matches!(self.form, Form::Inlined(_)) {
            let version = if domain == DOMAIN { OPSET_VERSION } else { 1 };
            model = model.message(8, opset_import(domain, version));
        }
        if let Form::Function(body) = &self.form {
            model = model.message(25, function(body, self.opset));
        }
        model.0
    }
}
