//! Every tensor of a model, in one fixed order.

use super::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto,
    TensorProto,
};

/// What a tensor is to the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorRole {
    /// An initializer of the graph or of a subgraph.
    Initializer,
    /// The value of a node's attribute, such as that of a `Constant`.
    Attribute,
    /// The values or indices of a sparse tensor.
    Sparse,
}

/// The two walks differ in nothing but mutability, and code relies on their order
/// being the same: they are written once.
macro_rules! walk {
    ($doc:literal, $walk:ident, $graph:ident, $function:ident, $nodes:ident, $attribute:ident,
     $sparse:ident, $as_option:ident, $($mutability:tt)?) => {
        #[doc = $doc]
        pub fn $walk<'a>(
            model: &'a $($mutability)? ModelProto,
            visit: &mut impl FnMut(TensorRole, &'a $($mutability)? TensorProto),
        ) {
            if let Some(graph) = model.graph.$as_option() {
                $graph(graph, visit);
            }
            for function in & $($mutability)? model.functions {
                $function(function, visit);
            }
            for training in & $($mutability)? model.training_info {
                if let Some(graph) = training.initialization.$as_option() {
                    $graph(graph, visit);
                }
                if let Some(graph) = training.algorithm.$as_option() {
                    $graph(graph, visit);
                }
            }
        }

        fn $graph<'a>(
            graph: &'a $($mutability)? GraphProto,
            visit: &mut impl FnMut(TensorRole, &'a $($mutability)? TensorProto),
        ) {
            for tensor in & $($mutability)? graph.initializer {
                visit(TensorRole::Initializer, tensor);
            }
            for tensor in & $($mutability)? graph.sparse_initializer {
                $sparse(tensor, visit);
            }
            $nodes(& $($mutability)? graph.node, visit);
        }

        fn $function<'a>(
            function: &'a $($mutability)? FunctionProto,
            visit: &mut impl FnMut(TensorRole, &'a $($mutability)? TensorProto),
        ) {
            for attribute in & $($mutability)? function.attribute_proto {
                $attribute(attribute, visit);
            }
            $nodes(& $($mutability)? function.node, visit);
        }

        fn $nodes<'a>(
            nodes: &'a $($mutability)? [NodeProto],
            visit: &mut impl FnMut(TensorRole, &'a $($mutability)? TensorProto),
        ) {
            for node in nodes {
                for attribute in & $($mutability)? node.attribute {
                    $attribute(attribute, visit);
                }
            }
        }

        fn $attribute<'a>(
            attribute: &'a $($mutability)? AttributeProto,
            visit: &mut impl FnMut(TensorRole, &'a $($mutability)? TensorProto),
        ) {
            if let Some(tensor) = attribute.t.$as_option() {
                visit(TensorRole::Attribute, tensor);
            }
            for tensor in & $($mutability)? attribute.tensors {
                visit(TensorRole::Attribute, tensor);
            }
            if let Some(tensor) = attribute.sparse_tensor.$as_option() {
                $sparse(tensor, visit);
            }
            for tensor in & $($mutability)? attribute.sparse_tensors {
                $sparse(tensor, visit);
            }
            if let Some(graph) = attribute.g.$as_option() {
                $graph(graph, visit);
            }
            for graph in & $($mutability)? attribute.graphs {
                $graph(graph, visit);
            }
        }

        fn $sparse<'a>(
            sparse: &'a $($mutability)? SparseTensorProto,
            visit: &mut impl FnMut(TensorRole, &'a $($mutability)? TensorProto),
        ) {
            if let Some(tensor) = sparse.values.$as_option() {
                visit(TensorRole::Sparse, tensor);
            }
            if let Some(tensor) = sparse.indices.$as_option() {
                visit(TensorRole::Sparse, tensor);
            }
        }
    };
}

walk!(
    "Visits every tensor of the graph, its subgraphs, the functions and the training graphs.",
    for_each_tensor,
    graph,
    function,
    nodes,
    attribute,
    sparse,
    as_option,
);
walk!(
    "[`for_each_tensor`], to change them; the order is the same.",
    for_each_tensor_mut,
    graph_mut,
    function_mut,
    nodes_mut,
    attribute_mut,
    sparse_mut,
    as_option_mut,
    mut
);
