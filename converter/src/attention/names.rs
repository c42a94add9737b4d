//! PyTorch module paths, as exporters leave them in node names, metadata and
//! initializer names.

use linfusion_models::onnx::proto::NodeProto;

/// Names of the layers inside an attention module; they end its path.
const LAYERS: [&str; 21] = [
    "to_q", "to_k", "to_v", "to_qkv", "to_kv", "to_out", "to_out.0", "query", "key", "value",
    "qkv", "proj", "q", "k", "v", "out_proj", "q_proj", "k_proj", "v_proj", "proj_out", "qkv_proj",
];

/// The module path in a TorchScript node name such as
/// `/down_blocks.0/attentions.0/transformer_blocks.0/attn1/to_q/MatMul`: without
/// the operator, `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.
#[must_use]
pub fn scope_of_node_name(name: &str) -> Option<String> {
    let name = name.strip_prefix('/')?;
    // ONNX Runtime appends the pass that made the node.
    let name = name
        .trim_end_matches("/MatMulAddFusion")
        .trim_end_matches("_MatMulAddFusion")
        .trim_end_matches("/WeightDequantizeLinear");
    let (scope, _) = name.rsplit_once('/')?;
    Some(scope.replace('/', "."))
}

/// The module path in the dynamo exporter's `pkg.torch.onnx.name_scopes`: a
/// Python list of the scopes from the root to the traced operation.
#[must_use]
pub fn scope_of_metadata(node: &NodeProto) -> Option<String> {
    let list = node
        .metadata_props
        .iter()
        .find(|p| p.key.as_deref() == Some("pkg.torch.onnx.name_scopes"))?
        .value
        .as_deref()?;
    let scopes: Vec<&str> = list
        .trim_matches(['[', ']'])
        .split(", ")
        .map(|s| s.trim_matches(['\'', '"']))
        .filter(|s| !s.is_empty())
        .collect();
    // The last entry is the operation itself.
    let modules = &scopes[..scopes.len().saturating_sub(1)];
    modules.last().map(|s| (*s).to_owned())
}

/// The module that a parameter name such as `….attn1.to_out.0.bias` belongs to.
#[must_use]
pub fn scope_of_parameter(name: &str) -> Option<String> {
    let name = name
        .trim_end_matches("_quantized")
        .trim_end_matches("_scale")
        .trim_end_matches("_zero_point");
    let scope = name
        .strip_suffix(".bias")
        .or_else(|| name.strip_suffix(".weight"))?;
    scope.contains('.').then(|| scope.to_owned())
}

/// Cuts a layer inside an attention module off: the attention module's path.
/// A scope that ends in no known layer is returned as it is.
#[must_use]
pub fn attention_module(scope: &str) -> String {
    let mut scope = scope;
    // Longest first, so that `to_out.0` goes before `0` could be left over.
    loop {
        let cut = LAYERS
            .iter()
            .filter_map(|l| scope.strip_suffix(l)?.strip_suffix('.'))
            .min_by_key(|s| s.len());
        match cut {
            Some(shorter) => scope = shorter,
            None => return scope.to_owned(),
        }
    }
}

/// Whether the scope names one of an attention module's layers.
#[must_use]
pub fn is_layer(scope: &str) -> bool {
    attention_module(scope) != scope
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(
        "/down_blocks.0/attentions.0/attn1/to_q/MatMul",
        Some("down_blocks.0.attentions.0.attn1.to_q")
    )]
    #[case("/blocks.0/attn/qkv/Gemm/MatMulAddFusion", Some("blocks.0.attn.qkv"))]
    #[case("node_linear_3", None)]
    #[case("/MatMul", None)]
    #[case("", None)]
    fn node_names(#[case] name: &str, #[case] scope: Option<&str>) {
        assert_eq!(scope_of_node_name(name).as_deref(), scope);
    }

    #[rstest]
    #[case("a.attn1.to_out.0", "a.attn1")]
    #[case("a.attn1.to_q", "a.attn1")]
    #[case("a.attn1", "a.attn1")]
    #[case("blocks.0.attn.proj", "blocks.0.attn")]
    #[case("a.attn1.not_q", "a.attn1.not_q")]
    fn modules(#[case] scope: &str, #[case] module: &str) {
        assert_eq!(attention_module(scope), module);
    }

    #[rstest]
    #[case(
        "down_blocks.0.attn1.to_out.0.bias",
        Some("down_blocks.0.attn1.to_out.0")
    )]
    #[case(
        "down_blocks.0.attn1.to_out.0.bias_quantized",
        Some("down_blocks.0.attn1.to_out.0")
    )]
    #[case("onnx::MatMul_5649", None)]
    #[case("bias", None)]
    fn parameters(#[case] name: &str, #[case] scope: Option<&str>) {
        assert_eq!(scope_of_parameter(name).as_deref(), scope);
    }
}
