//! Building the nodes of one site: names, layouts, and the operators themselves.

use linfusion_models::onnx::proto::{AttributeProto, NodeProto, TensorProto, ValueInfoProto};
use linfusion_models::onnx::{ElementType, make};
use linfusion_ops::LinFusionAttentionAttrs;
use linfusion_ops::schema::{DEFAULT_EPS, WindowAttentionAttrs};

use super::emit::{Operands, attention_nodes, window_nodes};
use super::site::{Context, SiteError};
use crate::attention::plain::{Columns, Layout, Plain, Tap};
use crate::graph::{NodeId, input, label, op};

pub(super) struct Builder<'a, 'm> {
    pub(super) context: &'a Context<'a, 'm>,
    pub(super) site: &'a Plain<'m>,
    pub(super) element: ElementType,
    pub(super) prefix: String,
    pub(super) module: &'a str,
    pub(super) nodes: Vec<NodeProto>,
    pub(super) initializers: Vec<TensorProto>,
    pub(super) value_info: Vec<ValueInfoProto>,
    pub(super) inputs: Vec<(NodeId, usize, String)>,
    pub(super) overflows: Vec<(String, usize)>,
}

impl<'a, 'm> Builder<'a, 'm> {
    pub(super) fn new(
        context: &'a Context<'a, 'm>,
        site: &'a Plain<'m>,
        element: ElementType,
        module: &'a str,
    ) -> Self {
        Builder {
            context,
            site,
            element,
            prefix: context.prefix(module),
            module,
            nodes: Vec::new(),
            initializers: Vec::new(),
            value_info: Vec::new(),
            inputs: Vec::new(),
            overflows: Vec::new(),
        }
    }
}

impl Builder<'_, '_> {
    /// Whether a new node makes `value`.
    pub(super) fn makes(&self, value: &str) -> bool {
        self.nodes
            .iter()
            .any(|n| n.output.iter().any(|o| o == value))
    }

    pub(super) fn op(
        &mut self,
        op: &str,
        step: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> String {
        let name = format!("{}/{step}/{op}", self.prefix);
        let out = format!("{name}_output_0");
        self.nodes
            .push(make::node(op, &name, inputs, &[&out], attributes));
        out
    }

    pub(super) fn ints(&mut self, step: &str, values: &[i64]) -> String {
        let name = format!("{}/{step}", self.prefix);
        self.initializers
            .push(make::tensor_i64(&name, &[values.len() as i64], values));
        name
    }

    pub(super) fn fail(&self, reason: String) -> SiteError {
        SiteError::Graph {
            anchor: self.prefix.clone(),
            reason,
        }
    }

    /// A matrix that lies as `layout`, as `[B, N, C]`.
    pub(super) fn tokens(
        &mut self,
        value: &str,
        layout: &Layout,
        step: &str,
    ) -> Result<String, SiteError> {
        let rank = self.context.shapes.shape(value).map_or(0, <[i64]>::len);
        Ok(match (layout, rank) {
            (Layout::Tokens, _) => value.to_owned(),
            (Layout::ChannelsFirst, 3) => self.op(
                "Transpose",
                step,
                &[value],
                vec![make::ints("perm", &[0, 2, 1])],
            ),
            (Layout::ChannelsFirst, 4) => {
                let shape = self.ints(&format!("{step}/shape"), &[0, 0, -1]);
                let flat = self.op("Reshape", step, &[value, &shape], vec![]);
                self.op(
                    "Transpose",
                    step,
                    &[&flat],
                    vec![make::ints("perm", &[0, 2, 1])],
                )
            }
            (Layout::Image, 4) => {
                let width = self
                    .context
                    .shapes
                    .shape(value)
                    .and_then(|s| s.last().copied())
                    .unwrap_or(-1);
                let shape = self.ints(&format!("{step}/shape"), &[0, -1, width]);
                self.op("Reshape", step, &[value, &shape], vec![])
            }
            (Layout::Rows, _) => {
                let like = self.site.x.to_owned();
                let leading = self.leading(&like, 2, step);
                let rest = self.ints(&format!("{step}/rest"), &[-1]);
                let shape = self.op(
                    "Concat",
                    step,
                    &[&leading, &rest],
                    vec![make::int("axis", 0)],
                );
                self.op("Reshape", step, &[value, &shape], vec![])
            }
            _ => {
                return Err(self.fail(format!(
                    "'{value}' of rank {rank} lies in a way that is not supported"
                )));
            }
        })
    }

    /// The attention's `[B, N, H·Dv]` as `[B·N, H·Dv]`.
    pub(super) fn rows(&mut self, value: &str) -> String {
        let width = self.site.heads * self.site.value_dim;
        let shape = self.ints("out/shape", &[-1, width]);
        self.op("Reshape", "out", &[value, &shape], vec![])
    }

    /// The first `n` dimensions of x, which must lie as tokens.
    pub(super) fn leading(&mut self, value: &str, n: i64, step: &str) -> String {
        let shape = self.op("Shape", &format!("{step}/like"), &[value], vec![]);
        let start = self.ints(&format!("{step}/like/start"), &[0]);
        let end = self.ints(&format!("{step}/like/end"), &[n]);
        self.op(
            "Slice",
            &format!("{step}/like"),
            &[&shape, &start, &end],
            vec![],
        )
    }

    /// q, k, v of the graph's own projections.
    pub(super) fn graph_projections(&mut self, x: &str) -> Result<[String; 3], SiteError> {
        let site = self.site;
        let merged = match site.taps.iter().any(|t| t.linear.is_none()) {
            true => Some(self.merged_projection(x)?),
            false => None,
        };
        let mut qkv = Vec::with_capacity(3);
        for (tap, step) in site.taps.iter().zip(["to_q", "to_k", "to_v"]) {
            let full = match &merged {
                Some(value) => value.clone(),
                None => self.tokens(tap.value, &tap.layout, step)?,
            };
            qkv.push(self.columns(&full, tap, step));
        }
        let mut qkv = qkv.into_iter();
        match (qkv.next(), qkv.next(), qkv.next()) {
            (Some(q), Some(k), Some(v)) => Ok([q, k, v]),
            _ => Err(self.fail("q, k, v are incomplete".to_owned())),
        }
    }

    /// x times the weights that `com.microsoft::Attention` holds, plus bias.
    pub(super) fn merged_projection(&mut self, x: &str) -> Result<String, SiteError> {
        let graph = self.context.graph;
        let node = graph
            .producer(self.site.merged)
            .map(|p| graph.node(p.node))
            .ok_or_else(|| self.fail("the attention node is gone".to_owned()))?;
        let Some(weight) = input(node, 1) else {
            return Err(self.fail(format!("'{}' has no weights", label(node))));
        };
        let product = self.op("MatMul", "to_qkv", &[x, weight], vec![]);
        Ok(match input(node, 2) {
            Some(bias) => self.op("Add", "to_qkv", &[&product, bias], vec![]),
            None => product,
        })
    }

    /// The layer of a tap once more, on another input `[B, N, C]`: q, k or v of that.
    pub(super) fn reapplied(
        &mut self,
        tap: &Tap<'_>,
        input: &str,
        step: &str,
    ) -> Result<String, SiteError> {
        let (graph, shapes) = (self.context.graph, self.context.shapes);
        let Some(linear) = tap.linear else {
            return Err(self.fail(
                "the attention node holds its own projections: the checkpoint must bring to_q and to_k".to_owned(),
            ));
        };
        // From the tap up to the layer: a bias, what undoes quantization, folds.
        let mut chain = Vec::new();
        let mut value = tap.value;
        while let Some(port) = graph.producer(value) {
            let slot = if port.node == linear.node {
                linear.slot
            } else {
                let node = graph.node(port.node);
                let data = |v: &String| !v.is_empty() && !shapes.fact(v).constant;
                match node.input.iter().position(data) {
                    Some(slot) => slot,
                    None => break,
                }
            };
            chain.push((port.node, slot));
            if port.node == linear.node || chain.len() > 8 {
                break;
            }
            value = graph
                .node(port.node)
                .input
                .get(slot)
                .map_or("", String::as_str);
        }
        let whole = chain.last().is_some_and(|(node, _)| *node == linear.node);
        let rank = shapes.shape(linear.source).map_or(0, <[i64]>::len);
        let float = shapes.fact(linear.source).element == Some(self.element.onnx());
        if !whole || !float || !matches!(rank, 2 | 3) {
            return Err(self.fail(format!(
                "the layer '{}' cannot be applied to another input: the checkpoint must bring its own",
                label(graph.node(linear.node))
            )));
        }
        let mut value = input.to_owned();
        if rank == 2 {
            let width = shapes.shape(linear.source).and_then(|s| s.last().copied());
            let flat = self.ints(&format!("{step}/rows"), &[-1, width.unwrap_or(-1)]);
            value = self.op("Reshape", &format!("{step}/rows"), &[&value, &flat], vec![]);
        }
        for (i, (node, slot)) in chain.into_iter().rev().enumerate() {
            let mut copy = graph.node(node).clone();
            let name = format!("{}/{step}/{i}/{}", self.prefix, op(&copy));
            if let Some(data) = copy.input.get_mut(slot) {
                *data = value;
            }
            value = format!("{name}_output_0");
            copy.name = Some(name);
            copy.output = vec![value.clone()];
            copy.metadata_props.clear();
            self.nodes.push(copy);
        }
        if rank == 2 {
            let leading = self.leading(input, 2, step);
            let rest = self.ints(&format!("{step}/rest"), &[-1]);
            let axis = vec![make::int("axis", 0)];
            let shape = self.op("Concat", step, &[&leading, &rest], axis);
            value = self.op("Reshape", step, &[&value, &shape], vec![]);
        }
        Ok(self.columns(&value, tap, step))
    }

    pub(super) fn columns(&mut self, value: &str, tap: &Tap<'_>, step: &str) -> String {
        match &tap.columns {
            Columns::All => value.to_owned(),
            Columns::Range { start, len } => {
                let start_name = self.ints(&format!("{step}/start"), &[*start]);
                let end = self.ints(&format!("{step}/end"), &[start + len]);
                let axis = self.ints(&format!("{step}/axis"), &[2]);
                self.op("Slice", step, &[value, &start_name, &end, &axis], vec![])
            }
            Columns::Listed(list) => {
                let indices = self.ints(&format!("{step}/columns"), list);
                self.op(
                    "Gather",
                    step,
                    &[value, &indices],
                    vec![make::int("axis", 2)],
                )
            }
        }
    }

    /// LinFusion attention of q, k and v; `like`: a value of its batch and tokens, where
    /// there is one.
    pub(super) fn attention(
        &mut self,
        qkv: &[String; 3],
        like: Option<&str>,
    ) -> Result<String, SiteError> {
        let name = format!("{}/LinFusionAttention", self.prefix);
        let out = format!("{name}_output_0");
        let attrs = LinFusionAttentionAttrs::new(self.site.heads, Some(DEFAULT_EPS))
            .map_err(|e| self.fail(e.to_string()))?;
        let [q, k, v] = qkv;
        let operands = Operands {
            inputs: &[q, k, v],
            out: &out,
            name: &name,
        };
        let nodes = attention_nodes(
            self.context.emit,
            &operands,
            attrs,
            self.context.opset,
            self.element,
        )?;
        self.nodes.extend(nodes);
        self.declare(&out, like);
        Ok(out)
    }

    pub(super) fn window_attention(
        &mut self,
        qkv: &[String; 3],
        grid: &str,
        attrs: &WindowAttentionAttrs,
    ) -> Result<String, SiteError> {
        let name = format!("{}/WindowAttention", self.prefix);
        let out = format!("{name}_output_0");
        let [q, k, v] = qkv;
        let operands = Operands {
            inputs: &[q, k, v, grid],
            out: &out,
            name: &name,
        };
        let nodes = window_nodes(
            self.context.emit,
            &operands,
            attrs,
            self.context.opset,
            self.element,
        )?;
        self.nodes.extend(nodes);
        let width = make::Dim::Fixed(self.site.heads * self.site.value_dim);
        let dims = [make::Dim::Unknown, make::Dim::Unknown, width];
        self.value_info
            .push(make::value_info(&out, self.element, &dims));
        Ok(out)
    }

    /// Declares the attention's output: engines that do not look into functions
    /// keep shapes then. Batch and tokens are those declared for `like`.
    fn declare(&mut self, value: &str, like: Option<&str>) {
        let width = make::Dim::Fixed(self.site.heads * self.site.value_dim);
        let proto = self.context.graph.proto;
        let declared = proto
            .value_info
            .iter()
            .chain(&proto.input)
            .find(|v| like.is_some() && v.name.as_deref() == like)
            .and_then(make::tensor_type_of)
            .and_then(|(_, dims)| dims)
            .filter(|d| d.len() == 3 && self.site.x_layout == Layout::Tokens);
        let dims = match declared.as_deref() {
            Some([b, n, _]) => [b.clone(), n.clone(), width],
            _ => [make::Dim::Unknown, make::Dim::Unknown, width],
        };
        self.value_info
            .push(make::value_info(value, self.element, &dims));
    }

    /// Brings `[B, N, C]` back to how the replaced value lay, under its name.
    pub(super) fn finish(
        &mut self,
        value: &str,
        target: &str,
        layout: &Layout,
    ) -> Result<(), SiteError> {
        let rank = self.context.shapes.shape(target).map_or(0, <[i64]>::len);
        match (layout, rank) {
            (Layout::Tokens, _) => {}
            (Layout::Rows, _) => {
                self.rows(value);
            }
            (Layout::ChannelsFirst, 3) => {
                self.op(
                    "Transpose",
                    "out",
                    &[value],
                    vec![make::ints("perm", &[0, 2, 1])],
                );
            }
            (Layout::ChannelsFirst, 4) if self.rank(self.site.x) == 4 => {
                let turned = self.op(
                    "Transpose",
                    "out",
                    &[value],
                    vec![make::ints("perm", &[0, 2, 1])],
                );
                let channels = self
                    .context
                    .shapes
                    .shape(target)
                    .and_then(|s| s.get(1).copied())
                    .unwrap_or(-1);
                let shape = self.spatial(&[0, channels], 2, "out");
                self.op("Reshape", "out", &[&turned, &shape], vec![]);
            }
            _ => {
                return Err(self.fail(format!(
                    "'{target}' of rank {rank} lies in a way that is not supported"
                )));
            }
        }
        // The last node makes the replaced value itself: readers, graph outputs
        // and captures in subgraphs stay as they are.
        match self.nodes.last_mut().and_then(|n| n.output.first_mut()) {
            Some(out) => {
                let old = std::mem::replace(out, target.to_owned());
                let proto = self.context.graph.proto;
                let declared = proto
                    .value_info
                    .iter()
                    .chain(&proto.output)
                    .any(|v| v.name.as_deref() == Some(target));
                if declared {
                    self.value_info.retain(|v| v.name.as_deref() != Some(&old));
                } else if let Some(info) = self
                    .value_info
                    .iter_mut()
                    .find(|v| v.name.as_deref() == Some(&old))
                {
                    info.name = Some(target.to_owned());
                }
                Ok(())
            }
            None => Err(self.fail("nothing was built".to_owned())),
        }
    }

    pub(super) fn rank(&self, value: &str) -> usize {
        self.context.shapes.shape(value).map_or(0, <[i64]>::len)
    }

    /// A shape of `head` (0 copies) and the dimensions of x from `from` on.
    pub(super) fn spatial(&mut self, head: &[i64], from: i64, step: &str) -> String {
        let x = self.site.x.to_owned();
        let shape = self.op("Shape", &format!("{step}/like"), &[&x], vec![]);
        let start = self.ints(&format!("{step}/like/start"), &[from]);
        let end = self.ints(&format!("{step}/like/end"), &[i64::from(i32::MAX)]);
        let tail = self.op(
            "Slice",
            &format!("{step}/like"),
            &[&shape, &start, &end],
            vec![],
        );
        let head = self.ints(&format!("{step}/head"), head);
        self.op("Concat", step, &[&head, &tail], vec![make::int("axis", 0)])
    }
}
