//! One node of a session: its attributes, and running it.

use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;

use half::{bf16, f16};
use ort_sys::{OrtKernelContext, OrtKernelInfo};

use super::OrtError;
use super::api::Api;
use super::device::CudaNode;
use super::entry::{Operator, Provider};
use super::pool::OrtPool;
use crate::cpu::{self, Element, Execution, Isa, Tensors};
use crate::schema::{
    Border, Dims, ElementType, LinFusionAttentionAttrs, ShapeError, TextSide, Window,
    WindowAttentionAttrs, WindowDims,
};

const ATTR_NUM_HEADS: &CStr = c"num_heads";
const ATTR_EPS: &CStr = c"eps";
const ATTR_SCALE: &CStr = c"scale";
const ATTR_WINDOW: &CStr = c"window";
const ATTR_RADIUS: &CStr = c"radius";
const ATTR_BORDER: &CStr = c"border";
const ATTR_TEXT: &CStr = c"text";

/// One node of a session.
pub(super) struct Node {
    pub(super) api: Api,
    name: String,
    pub(super) attrs: Attrs,
    pub(super) element: ElementType,
    /// What a node of the CUDA provider has beside.
    cuda: Option<CudaNode>,
}

pub(super) enum Attrs {
    Linear(LinFusionAttentionAttrs),
    Window(WindowAttentionAttrs),
}

/// The attributes of a node that is being made.
#[derive(Clone, Copy)]
struct Reader {
    api: Api,
    info: *const OrtKernelInfo,
}

impl Reader {
    /// # Safety
    /// `info` must be what the `CreateKernel` callback was given; so for all methods.
    unsafe fn linear(self) -> Result<LinFusionAttentionAttrs, OrtError> {
        // SAFETY: by the contract above.
        unsafe {
            let heads = self.int(ATTR_NUM_HEADS).ok_or(OrtError::NumHeads)?;
            let eps = self.float(ATTR_EPS)?;
            LinFusionAttentionAttrs::new(heads, eps).map_err(attr_error)
        }
    }

    unsafe fn window(self) -> Result<WindowAttentionAttrs, OrtError> {
        // SAFETY: by the contract above.
        unsafe {
            let heads = self.int(ATTR_NUM_HEADS).ok_or(OrtError::NumHeads)?;
            let size = |v: i64| usize::try_from(v).unwrap_or(0);
            let sides = self.api.ints_attribute(self.info, ATTR_WINDOW).ok();
            let radius = self.int(ATTR_RADIUS);
            let window = match (sides.as_deref(), radius) {
                (Some(&[rows, cols]), None) => Window::Rect {
                    rows: size(rows),
                    cols: size(cols),
                },
                (None, Some(radius)) => Window::Circle {
                    radius: size(radius),
                },
                _ => {
                    return Err(OrtError::WindowOrRadius {
                        window: sides,
                        radius,
                    });
                }
            };
            let default = match window {
                Window::Rect { .. } => Border::Clamp,
                Window::Circle { .. } => Border::Truncate,
            };
            let attrs = WindowAttentionAttrs {
                num_heads: size(heads),
                scale: self.float(ATTR_SCALE)?.filter(|s| *s != 0.0),
                window,
                border: self.choice(
                    ATTR_BORDER,
                    default,
                    &[Border::Clamp, Border::Truncate],
                    Border::name,
                )?,
                text: self.choice(
                    ATTR_TEXT,
                    TextSide::Prefix,
                    &[TextSide::Prefix, TextSide::Suffix],
                    TextSide::name,
                )?,
            };
            attrs.check().map_err(attr_error)?;
            Ok(attrs)
        }
    }

    unsafe fn int(self, name: &CStr) -> Option<i64> {
        // SAFETY: by the contract above.
        unsafe { self.api.int_attribute(self.info, name) }.ok()
    }

    unsafe fn float(self, name: &'static CStr) -> Result<Option<f32>, OrtError> {
        // SAFETY: by the contract above.
        unsafe {
            match self.api.float_attribute(self.info, name) {
                Ok(value) => Ok(Some(value)),
                // There is no "is it there?": an attribute that reads as an integer is.
                Err(_) if self.int(name).is_some() => Err(OrtError::FloatType {
                    attribute: name.to_str().unwrap_or(""),
                }),
                Err(_) => Ok(None),
            }
        }
    }

    unsafe fn choice<C: Copy>(
        self,
        name: &'static CStr,
        default: C,
        choices: &[C],
        spelled: fn(C) -> &'static str,
    ) -> Result<C, OrtError> {
        // SAFETY: by the contract above.
        let Ok(found) = (unsafe { self.api.string_attribute(self.info, name) }) else {
            return Ok(default);
        };
        let choice = choices.iter().find(|c| spelled(**c) == found).copied();
        choice.ok_or_else(|| OrtError::Choice {
            attribute: name.to_str().unwrap_or(""),
            expected: choices
                .iter()
                .map(|c| spelled(*c))
                .collect::<Vec<_>>()
                .join(" or "),
            found,
        })
    }
}

fn attr_error(error: crate::schema::AttrError) -> OrtError {
    OrtError::Shape(ShapeError::Attr(error))
}

impl Node {
    /// # Safety
    /// `info` must be what the `CreateKernel` callback was given.
    pub(super) unsafe fn new(
        api: Api,
        info: *const OrtKernelInfo,
        operator: Operator,
        element: ElementType,
        provider: Provider,
    ) -> Result<Self, OrtError> {
        // SAFETY: by the contract above.
        let name = unsafe { api.node_name(info) }?;
        let make = || {
            let read = Reader { api, info };
            // SAFETY: by the contract above.
            let attrs = unsafe {
                match operator {
                    Operator::Linear => read.linear().map(Attrs::Linear),
                    Operator::Window => read.window().map(Attrs::Window),
                }
            }?;
            let cuda = match provider {
                Provider::Cpu => None,
                Provider::Cuda => Some(CudaNode::new(api)?),
            };
            Ok((attrs, cuda))
        };
        match make() {
            Err(error) => Err(with_node(&name, operator, error)),
            Ok((attrs, cuda)) => Ok(Self {
                api,
                name,
                attrs,
                element,
                cuda,
            }),
        }
    }

    fn operator(&self) -> Operator {
        match self.attrs {
            Attrs::Linear(_) => Operator::Linear,
            Attrs::Window(_) => Operator::Window,
        }
    }

    /// # Safety
    /// `context` must be the running node's.
    pub(super) unsafe fn compute(&self, context: *mut OrtKernelContext) -> Result<(), OrtError> {
        // SAFETY: by the contract above.
        let result = unsafe {
            match (&self.cuda, self.element) {
                (Some(cuda), _) => cuda.compute(self, context),
                (None, ElementType::F32) => self.compute_as::<f32>(context),
                (None, ElementType::F16) => self.compute_as::<f16>(context),
                (None, ElementType::Bf16) => self.compute_as::<bf16>(context),
                (None, ElementType::F64) => self.compute_as::<f64>(context),
            }
        };
        result.map_err(|error| with_node(&self.name, self.operator(), error))
    }

    /// # Safety
    /// As for [`Self::compute`].
    unsafe fn compute_as<T: Element>(
        &self,
        context: *mut OrtKernelContext,
    ) -> Result<(), OrtError> {
        let code = T::TYPE.onnx_code();
        // SAFETY: by the contract above; slices have the lengths of the tensors' shapes, and the
        // output is written only through `out`.
        unsafe {
            let q = self.input::<T>(context, 0, code)?;
            let k = self.input::<T>(context, 1, code)?;
            let v = self.input::<T>(context, 2, code)?;
            let pool = OrtPool::new(self.api, context);
            let execution = Execution {
                isa: Isa::best(),
                pool: &pool,
            };
            let mut tensors = Tensors {
                q: q.data,
                k: k.data,
                v: v.data,
                out: &mut [],
            };
            match &self.attrs {
                Attrs::Linear(attrs) => {
                    let dims = Dims::new(&q.shape, &k.shape, &v.shape, attrs)?;
                    tensors.out = self.output(context, &dims.out_shape())?;
                    cpu::linfusion_attention(&dims, attrs.eps, tensors, execution)?;
                }
                Attrs::Window(attrs) => {
                    let grid = self.grid(context)?;
                    let dims = WindowDims::new(&q.shape, &k.shape, &v.shape, grid, attrs)?;
                    tensors.out = self.output(context, &dims.out_shape())?;
                    cpu::window_attention(&dims, attrs, tensors, execution)?;
                }
            }
            pool.result()
        }
    }

    /// # Safety
    /// As for [`Self::compute`]; the result must not outlive the callback, and T must be the
    /// element type of the entry.
    unsafe fn output<'a, T>(
        &self,
        context: *mut OrtKernelContext,
        shape: &[usize],
    ) -> Result<&'a mut [MaybeUninit<T>], OrtError> {
        let len: usize = shape.iter().product();
        let shape: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
        // SAFETY: by the contract above; the tensor has room for its shape.
        unsafe {
            let value = self.api.output(context, 0, &shape)?;
            if len == 0 {
                return Ok(&mut []);
            }
            let data = self.api.tensor_data(value)?.cast::<MaybeUninit<T>>();
            Ok(std::slice::from_raw_parts_mut(data, len))
        }
    }

    /// # Safety
    /// As for [`Self::compute`]; the result must not outlive the callback, elements of type
    /// `code` must be T, and the tensor must lie in the host's memory.
    pub(super) unsafe fn input<'a, T>(
        &self,
        context: *const OrtKernelContext,
        index: usize,
        code: i32,
    ) -> Result<Input<'a, T>, OrtError> {
        // SAFETY: by the contract above; the tensor's data has the length of its shape.
        unsafe {
            let Placed { shape, address } = self.placed(context, index, code)?;
            let len = shape.iter().product();
            let data = if len == 0 {
                &[]
            } else {
                std::slice::from_raw_parts(address.cast::<T>(), len)
            };
            Ok(Input { shape, data })
        }
    }

    /// An input's shape and address.
    ///
    /// # Safety
    /// As for [`Self::compute`].
    pub(super) unsafe fn placed(
        &self,
        context: *const OrtKernelContext,
        index: usize,
        code: i32,
    ) -> Result<Placed, OrtError> {
        let input = self.operator().inputs().get(index).copied().unwrap_or("");
        // SAFETY: by the contract above.
        unsafe {
            let value = self.api.input(context, index)?;
            if value.is_null() {
                return Err(OrtError::MissingInput { input });
            }
            let (found, shape) = self.api.tensor_info(value)?;
            if found != code {
                return Err(OrtError::ElementType {
                    input,
                    expected: code,
                    found,
                });
            }
            let shape = shape
                .iter()
                .map(|&d| usize::try_from(d))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| OrtError::NegativeDim {
                    input,
                    shape: shape.clone(),
                })?;
            let address = self.api.tensor_data(value.cast_mut())?;
            Ok(Placed { shape, address })
        }
    }

    /// The two numbers of the input `grid`, which lies in the host's memory on every provider.
    ///
    /// # Safety
    /// As for [`Self::compute`].
    pub(super) unsafe fn grid(
        &self,
        context: *const OrtKernelContext,
    ) -> Result<[i64; 2], OrtError> {
        // SAFETY: by the contract above.
        let grid = unsafe { self.input::<i64>(context, 3, INT64) }?;
        let &[rows, cols] = grid.data else {
            return Err(OrtError::GridShape { shape: grid.shape });
        };
        Ok([rows, cols])
    }
}

/// `TensorProto.INT64`.
const INT64: i32 = 7;

fn with_node(node: &str, operator: Operator, error: OrtError) -> OrtError {
    OrtError::Node {
        node: node.into(),
        operator: operator.name(),
        source: Box::new(error),
    }
}

pub(super) struct Input<'a, T> {
    shape: Vec<usize>,
    data: &'a [T],
}

/// A tensor, wherever it lies.
pub(super) struct Placed {
    pub(super) shape: Vec<usize>,
    pub(super) address: *mut c_void,
}
