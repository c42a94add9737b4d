//! Where each tensor's bytes go: into the model file, into a new data file beside
//! it, or nowhere, because they stay in a data file that is there already.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use buffa::{Message, Rope};
use bytes::Bytes;

use super::pieces::Piece;
use super::{ExternalData, Note, WriteError, WriteOptions};
use crate::onnx::external::{ExternalRef, can_be_external, drop_inline, is_external};
use crate::onnx::folder::Route;
use crate::onnx::proto::{ModelProto, TensorProto};
use crate::onnx::walk::{TensorRole, for_each_tensor, for_each_tensor_mut};
use crate::onnx::{MAX_MODEL_BYTES, OnnxFile, TensorData};

/// What is to be written, and what it needs beside it.
pub(super) struct Layout {
    /// The model file.
    pub model: Vec<Piece>,
    /// The new data file; empty if there is none.
    pub data: Vec<Piece>,
    /// Data files of the input that the output goes on using.
    pub reused: Vec<PathBuf>,
    pub notes: Vec<Note>,
}

/// The model file and the data file.
type Files = (Vec<Piece>, Vec<Piece>);

/// The place for one tensor's bytes.
enum Place {
    /// Leave the tensor as it is.
    AsIs,
    /// Into the model file.
    Inline(Bytes),
    /// Into the new data file.
    Data(ExternalRef),
}

pub(super) struct Planner<'a> {
    pub model: &'a ModelProto,
    pub source: Option<&'a OnnxFile>,
    pub options: &'a WriteOptions,
    /// Whether the output lies in the folder that the input was opened in.
    pub same_folder: bool,
    /// The new data file's name, if it can be written into a model.
    pub data_name: Option<&'a str>,
    pub out: &'a Path,
}

/// The smallest page and block size that readers map files by.
const PAGE: u64 = 4096;
/// The largest alignment worth keeping: the granularity of maps on Windows.
const MAX_ALIGNMENT: u64 = 65_536;

impl Planner<'_> {
    pub(super) fn plan(&self) -> Result<Layout, WriteError> {
        let external = self.external_tensors()?;
        let mut notes = Vec::new();
        let mut mode = self.mode(&external)?;
        let inlined: u64 = external.iter().map(|t| t.bytes.len() as u64).sum();
        if mode == Mode::Inline && inlined > self.limit() {
            notes.push(Note::TooLargeForOneFile);
            mode = Mode::Copy;
        }
        let mut attempt = self.lay_out(mode, Spill::NewTensors, &external)?;
        for spill in [Spill::Initializers, Spill::Everything] {
            if attempt.is_some() {
                break;
            }
            if !notes.contains(&Note::TooLargeForOneFile) {
                notes.push(Note::TooLargeForOneFile);
            }
            if mode == Mode::Inline {
                mode = Mode::Copy;
            }
            attempt = self.lay_out(mode, spill, &external)?;
        }
        let (model, data) = attempt.ok_or_else(|| WriteError::TooLarge {
            path: self.out.to_owned(),
        })?;
        let mut reused = Vec::new();
        if mode == Mode::Reuse {
            let folder = self
                .source
                .and_then(OnnxFile::folder)
                .unwrap_or(Path::new(""));
            for tensor in &external {
                let path = folder.join(&tensor.location);
                if !reused.contains(&path) {
                    reused.push(path);
                }
            }
        }
        Ok(Layout {
            model,
            data,
            reused,
            notes,
        })
    }

    /// All tensors with external data, resolved and checked: a broken reference
    /// must not be handed on.
    fn external_tensors(&self) -> Result<Vec<External>, WriteError> {
        let mut found = Vec::new();
        let mut failure = None;
        for_each_tensor(self.model, &mut |_, tensor| {
            if failure.is_none() && is_external(tensor) {
                match self.resolve(tensor) {
                    Ok(external) => found.push(external),
                    Err(error) => failure = Some(error),
                }
            }
        });
        failure.map_or(Ok(found), Err)
    }

    fn resolve(&self, tensor: &TensorProto) -> Result<External, WriteError> {
        let source = self.source.ok_or_else(|| WriteError::NoSource {
            tensor: tensor.name.clone().unwrap_or_default(),
        })?;
        let bytes = source.tensor_bytes(tensor)?;
        // Both were checked by `tensor_bytes`.
        let route = match ExternalRef::of(tensor) {
            Ok(reference) => source
                .data_file(&reference.location)
                .map(|f| (reference, f.route)),
            Err(_) => return Err(WriteError::Internal("an external reference changed")),
        };
        match route {
            Ok((reference, route)) => Ok(External {
                bytes,
                offset: reference.offset,
                location: reference.location,
                route,
            }),
            Err(_) => Err(WriteError::Internal(
                "a data file disappeared from the cache",
            )),
        }
    }

    fn mode(&self, external: &[External]) -> Result<Mode, WriteError> {
        let beside = self.same_folder && external.iter().all(|t| t.route == Route::Below);
        Ok(match self.options.external {
            _ if external.is_empty() => Mode::Copy,
            ExternalData::Auto if beside => Mode::Reuse,
            ExternalData::Auto | ExternalData::Copy => Mode::Copy,
            ExternalData::Reuse if self.same_folder => Mode::Reuse,
            ExternalData::Reuse => {
                return Err(WriteError::ReuseElsewhere {
                    path: self.out.to_owned(),
                    folder: self
                        .source
                        .and_then(OnnxFile::folder)
                        .unwrap_or(Path::new(""))
                        .to_owned(),
                });
            }
            ExternalData::Inline => Mode::Inline,
        })
    }

    /// The pieces of both files; `None` if the model file would be too large.
    fn lay_out(
        &self,
        mode: Mode,
        spill: Spill,
        external: &[External],
    ) -> Result<Option<Files>, WriteError> {
        let mut data = DataLayout::default();
        let mut places = Vec::new();
        let mut next_external = external.iter();
        let mut failure = None;
        let mut changes = false;
        for_each_tensor(self.model, &mut |role, tensor| {
            let place = if is_external(tensor) {
                next_external
                    .next()
                    .map_or(Ok(Place::AsIs), |t| self.place_old(mode, t, &mut data))
            } else if self.goes_out(mode, spill, role, tensor, external) {
                self.place_new(tensor, &mut data)
            } else {
                Ok(Place::AsIs)
            };
            match place {
                Ok(place) => {
                    changes |= !matches!(place, Place::AsIs);
                    places.push(place);
                }
                Err(error) => failure = failure.take().or(Some(error)),
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        let mut model = Cow::Borrowed(self.model);
        if changes {
            let mut places = places.into_iter();
            for_each_tensor_mut(model.to_mut(), &mut |_, tensor| match places.next() {
                None | Some(Place::AsIs) => {}
                Some(Place::Data(reference)) => reference.apply(tensor),
                Some(Place::Inline(bytes)) => {
                    drop_inline(tensor);
                    tensor.external_data.clear();
                    tensor.data_location = None;
                    tensor.raw_data = Some(bytes);
                }
            });
        }
        Ok(self.encode(&model)?.map(|model| (model, data.pieces)))
    }

    fn place_old(
        &self,
        mode: Mode,
        tensor: &External,
        data: &mut DataLayout,
    ) -> Result<Place, WriteError> {
        Ok(match mode {
            Mode::Reuse => Place::AsIs,
            Mode::Inline => Place::Inline(tensor.bytes.clone()),
            Mode::Copy => Place::Data(data.add(
                &tensor.bytes,
                alignment_of(tensor.offset),
                self.data_name()?,
            )),
        })
    }

    fn place_new(&self, tensor: &TensorProto, data: &mut DataLayout) -> Result<Place, WriteError> {
        let bytes = TensorData::inline(tensor)?.bytes;
        let alignment = if bytes.len() >= 1 << 20 { PAGE } else { 64 };
        Ok(Place::Data(data.add(&bytes, alignment, self.data_name()?)))
    }

    /// Whether a tensor that is held inline moves to the new data file.
    fn goes_out(
        &self,
        mode: Mode,
        spill: Spill,
        role: TensorRole,
        tensor: &TensorProto,
        external: &[External],
    ) -> bool {
        let Some(raw) = &tensor.raw_data else {
            return spill == Spill::Everything
                && can_be_external(tensor)
                && role != TensorRole::Sparse;
        };
        if raw.len() < self.options.min_external_bytes || !can_be_external(tensor) {
            return false;
        }
        match (spill, role) {
            (_, TensorRole::Sparse) => false,
            (Spill::Everything, _) | (Spill::Initializers, TensorRole::Initializer) => true,
            (Spill::Initializers, TensorRole::Attribute) => false,
            // What the input held inline stays inline, as its author chose.
            (Spill::NewTensors, TensorRole::Initializer) => {
                let source = self.source.and_then(OnnxFile::source);
                let is_new = source.is_none_or(|s| s.map.locate(raw).is_none());
                mode != Mode::Inline && !external.is_empty() && is_new
            }
            (Spill::NewTensors, TensorRole::Attribute) => false,
        }
    }

    fn encode(&self, model: &ModelProto) -> Result<Option<Vec<Piece>>, WriteError> {
        match model.try_encoded_len() {
            Ok(length) if u64::from(length) <= self.limit() => {}
            _ => return Ok(None),
        }
        let mut rope = Rope::new();
        if model.try_encode(&mut rope).is_err() {
            return Ok(None);
        }
        Ok(Some(
            rope.into_segments().into_iter().map(Piece::Bytes).collect(),
        ))
    }

    fn limit(&self) -> u64 {
        self.options.max_model_bytes.min(MAX_MODEL_BYTES)
    }

    fn data_name(&self) -> Result<&str, WriteError> {
        self.data_name.ok_or_else(|| WriteError::NameNotUtf8 {
            path: self.out.to_owned(),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Reuse,
    Copy,
    Inline,
}

/// Which inline tensors move to a data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spill {
    /// New ones, if the model uses external data at all.
    NewTensors,
    /// All initializers: the model file would be too large.
    Initializers,
    /// Attribute values too. Not every runtime reads those from a data file, so
    /// this is the last resort.
    Everything,
}

struct External {
    bytes: Bytes,
    location: String,
    offset: u64,
    route: Route,
}

/// The data file under construction.
#[derive(Default)]
struct DataLayout {
    pieces: Vec<Piece>,
    length: u64,
    /// Tensors that share their bytes go on sharing them.
    placed: HashMap<(usize, usize), u64>,
}

impl DataLayout {
    fn add(&mut self, bytes: &Bytes, alignment: u64, location: &str) -> ExternalRef {
        let key = (bytes.as_ptr().addr(), bytes.len());
        let offset = match self.placed.get(&key) {
            Some(offset) => *offset,
            None => {
                let offset = self.length.next_multiple_of(alignment);
                if offset > self.length {
                    self.pieces.push(Piece::Zeros(offset - self.length));
                }
                if !bytes.is_empty() {
                    self.pieces.push(Piece::Bytes(bytes.clone()));
                }
                self.length = offset + bytes.len() as u64;
                self.placed.insert(key, offset);
                offset
            }
        };
        ExternalRef {
            location: location.to_owned(),
            offset,
            length: Some(bytes.len() as u64),
        }
    }
}

/// The alignment that a tensor has in its old file. Offset 0 tells nothing: it is
/// also where unaligned files begin.
fn alignment_of(offset: u64) -> u64 {
    match offset {
        0 => PAGE,
        offset => (1 << offset.trailing_zeros()).min(MAX_ALIGNMENT),
    }
}
