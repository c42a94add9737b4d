//! Sites that are done, kept until the whole is: an interrupted distillation goes on where it was.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use linfusion_models::checkpoint::Part;
use linfusion_runtime::whole::write_whole;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::error::DistillError;
use super::report::SiteReport;
use super::student::Weights;

/// Where the sites that are done are kept while the checkpoint `output` is not: `<output>.unfinished`.
#[must_use]
pub fn unfinished(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_owned();
    name.push(".unfinished");
    output.with_file_name(name)
}

/// How often a folder that is gone again is made.
const TRIES: usize = 100;

/// The folder [`unfinished`], held against other processes; goes with this if nothing is kept in it.
pub(super) struct Claim {
    folder: PathBuf,
    /// What an earlier run left was there already.
    pub resumes: bool,
    handle: File,
}

impl Claim {
    /// # Errors
    /// Another process learns into the same output, or the folder cannot be made.
    pub fn of(output: &Path) -> Result<Self, DistillError> {
        let folder = unfinished(output);
        let failed = |source| DistillError::Write {
            path: folder.clone(),
            source,
        };
        // The folder of a process that ends may go between any two of these; some network file systems number what is open and
        // what is named apart.
        let mut tries = 0;
        let handle = loop {
            tries += 1;
            fs::create_dir_all(&folder).map_err(failed)?;
            let handle = match File::open(&folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && tries < TRIES => continue,
                opened => opened.map_err(failed)?,
            };
            match handle.try_lock() {
                Err(TryLockError::WouldBlock) => {
                    return Err(DistillError::Busy {
                        output: output.to_owned(),
                        folder,
                    });
                }
                // Some network file systems have no locks.
                Ok(()) | Err(TryLockError::Error(_)) => {}
            }
            if is_at(&handle, &folder) || tries == TRIES {
                break handle;
            }
        };
        let resumes = folder.read_dir().map_err(failed)?.next().is_some();
        Ok(Self {
            folder,
            resumes,
            handle,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if is_at(&self.handle, &self.folder) {
            // Fails, as it should, where something is kept.
            let _ = fs::remove_dir(&self.folder);
        }
    }
}

/// Whether this open folder still has its name.
fn is_at(handle: &File, folder: &Path) -> bool {
    match (handle.metadata(), folder.metadata()) {
        (Ok(own), Ok(there)) => (own.dev(), own.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// What is in the folder [`unfinished`].
pub(super) struct State {
    folder: PathBuf,
    key: String,
}

/// A site that is done.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Done {
    pub weights: Weights,
    pub report: SiteReport,
}

fn named(phase: &str, site: usize) -> String {
    format!("{phase}-{site:04}")
}

const KEY: &str = "request";
const REPORT: &str = "report";

impl State {
    /// The state of a distillation into `output`, which is the same only for the same `request`: everything that the
    /// weights depend on, as text.
    pub fn of(output: &Path, request: &str) -> Self {
        let digest = Sha256::digest(request.as_bytes());
        Self {
            folder: unfinished(output),
            key: digest.iter().map(|b| format!("{b:02x}")).collect(),
        }
    }

    /// The state of a part of it, which depends on `more` as well.
    pub fn with(&self, more: &str) -> Self {
        let digest = Sha256::digest(format!("{} {more}", self.key).as_bytes());
        Self {
            folder: self.folder.clone(),
            key: digest.iter().map(|b| format!("{b:02x}")).collect(),
        }
    }

    fn tensors(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.safetensors"))
    }

    /// A site that an earlier run with the same request finished; anything else is none.
    pub fn load(&self, phase: &str, site: usize) -> Option<Done> {
        let (report, mut tensors) = self.load_tensors(&named(phase, site))?;
        let part = |part: &Part| Some((*part, tensors.remove(&part.suffix())?));
        Some(Done {
            weights: Weights(Part::ALL.iter().filter_map(part).collect()),
            report,
        })
    }

    /// Keeps a site that is done.
    ///
    /// # Errors
    /// The disk is full, or the output's folder cannot be written to.
    pub fn save(&self, phase: &str, site: usize, done: &Done) -> Result<(), DistillError> {
        let parts = done.weights.0.iter();
        let tensors = parts.map(|(part, values)| (part.suffix(), values.as_slice()));
        self.save_tensors(&named(phase, site), &done.report, tensors.collect())
    }

    /// What [`Self::save_tensors`] kept for the same request.
    pub fn load_tensors<T: DeserializeOwned>(
        &self,
        name: &str,
    ) -> Option<(T, HashMap<String, Vec<f32>>)> {
        let bytes = fs::read(self.tensors(name)).ok()?;
        let (_, header) = SafeTensors::read_metadata(&bytes).ok()?;
        let told = header.metadata().as_ref()?;
        if told.get(KEY) != Some(&self.key) {
            return None;
        }
        let report: T = serde_json::from_str(told.get(REPORT)?).ok()?;
        let mut tensors = HashMap::new();
        for (name, view) in SafeTensors::deserialize(&bytes).ok()?.tensors() {
            let (words, rest) = view.data().as_chunks();
            if !rest.is_empty() {
                return None;
            }
            let values = words.iter().map(|w| f32::from_le_bytes(*w)).collect();
            tensors.insert(name, values);
        }
        Some((report, tensors))
    }

    /// Keeps numbers by name, and what is told of them.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub fn save_tensors<T: Serialize>(
        &self,
        name: &str,
        report: &T,
        tensors: Vec<(String, &[f32])>,
    ) -> Result<(), DistillError> {
        let path = self.tensors(name);
        let failed = |source: io::Error| DistillError::Write {
            path: path.clone(),
            source,
        };
        let report = serde_json::to_string(report).map_err(|e| failed(io::Error::other(e)))?;
        let bytes: Vec<(String, Vec<u8>)> = tensors
            .into_iter()
            .map(|(name, values)| (name, values.iter().flat_map(|v| v.to_le_bytes()).collect()))
            .collect();
        let views = bytes
            .iter()
            .map(|(name, bytes)| {
                TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes).map(|view| (name, view))
            })
            .collect::<Result<Vec<_>, _>>();
        let told = HashMap::from([
            (KEY.to_owned(), self.key.clone()),
            (REPORT.to_owned(), report),
        ]);
        let written = views
            .and_then(|views| serialize(views, Some(told)))
            .map_err(|e| failed(io::Error::other(e)))?;
        self.write(&path, &written)
    }

    /// What [`Self::save_value`] kept for the same request.
    pub fn load_value<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let bytes = fs::read(self.folder.join(format!("{name}.json"))).ok()?;
        let (key, value): (String, T) = serde_json::from_slice(&bytes).ok()?;
        (key == self.key).then_some(value)
    }

    /// Keeps what was measured.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub fn save_value<T: Serialize>(&self, name: &str, value: &T) -> Result<(), DistillError> {
        let path = self.folder.join(format!("{name}.json"));
        let failed = |source: io::Error| DistillError::Write {
            path: path.clone(),
            source,
        };
        let bytes = serde_json::to_vec(&(&self.key, value));
        let bytes = bytes.map_err(|e| failed(io::Error::other(e)))?;
        self.write(&path, &bytes)
    }

    /// Writes a file of the folder, whole or not at all.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), DistillError> {
        let failed = |source: io::Error| DistillError::Write {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(&self.folder).map_err(failed)?;
        write_whole(path, bytes).map_err(failed)
    }

    /// Removes it: the output is there.
    pub fn clear(self) {
        // What is left of it is replaced or ignored by a later run.
        let _ = fs::remove_dir_all(&self.folder);
    }
}
