//! Tensors on the host, or where an engine put them.

use std::sync::Arc;

use super::{Device, ort};
use crate::tensor::{DType, Tensor};

/// Where a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Location {
    /// In this program's memory.
    Host,
    /// In memory of the engine's, on the device that its sessions run on.
    Device,
}

/// A tensor that sessions take and give, wherever it is. Copies share the elements.
#[derive(Clone)]
pub struct Value(Held);

#[derive(Clone)]
pub(super) enum Held {
    Host(Arc<Tensor>),
    Ort(Arc<ort::Bound>),
}

impl Value {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match &self.0 {
            Held::Host(tensor) => tensor.dtype(),
            Held::Ort(bound) => bound.dtype(),
        }
    }

    /// Dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        match &self.0 {
            Held::Host(tensor) => tensor.shape(),
            Held::Ort(bound) => bound.shape(),
        }
    }

    /// Whose memory it is in.
    pub fn device(&self) -> Device {
        match &self.0 {
            Held::Host(_) => Device::Cpu,
            Held::Ort(bound) => bound.device(),
        }
    }

    /// The tensor, if it is on the host.
    pub fn host(&self) -> Option<&Tensor> {
        match &self.0 {
            Held::Host(tensor) => Some(tensor),
            Held::Ort(_) => None,
        }
    }

    /// The tensor, if it is on the host, without a copy where nobody shares it.
    pub fn into_host(self) -> Option<Tensor> {
        match self.0 {
            Held::Host(tensor) => Some(Arc::unwrap_or_clone(tensor)),
            Held::Ort(_) => None,
        }
    }

    pub(super) fn bound(bound: ort::Bound) -> Self {
        Self(Held::Ort(Arc::new(bound)))
    }

    pub(super) fn held(&self) -> &Held {
        &self.0
    }
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Self {
        Self(Held::Host(Arc::new(tensor)))
    }
}
