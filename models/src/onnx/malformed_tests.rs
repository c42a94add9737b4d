//! Models that reach for files they must not have, or lie about them. Each row is
//! a way in which readers of ONNX files were once wrong.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use buffa::Message;
use tempfile::TempDir;

use super::check::check_model;
use super::proto::TensorProto;
use super::read_tests::small_model;
use super::write::{ExternalData, WriteOptions, stage};
use super::*;

/// What the data file and the reference to it look like.
struct Case {
    name: &'static str,
    /// Prepares the folder; `w.bin` (16 bytes) is there already, and so is
    /// `../outside/secret` (16 bytes).
    prepare: fn(&Path),
    entries: &'static [(&'static str, &'static str)],
    dims: &'static [i64],
    expected: &'static str,
}

const PLAIN: Case = Case {
    name: "plain",
    prepare: |_| {},
    entries: &[("location", "w.bin"), ("offset", "0"), ("length", "16")],
    dims: &[4],
    expected: "",
};

fn link(target: &str, dir: &Path, name: &str) {
    symlink(target, dir.join(name)).unwrap();
}

const LINKED: &[(&str, &str)] = &[("location", "link")];

fn malformed() -> Vec<Case> {
    let case = |name, expected| Case {
        name,
        expected,
        ..PLAIN
    };
    let refers = |name, entries, expected| Case {
        entries,
        ..case(name, expected)
    };
    let files = |name, prepare, entries, expected| Case {
        prepare,
        ..refers(name, entries, expected)
    };
    let shaped = |name, dims, expected| Case {
        dims,
        ..case(name, expected)
    };
    vec![
        refers(
            "absolute path",
            &[("location", "/etc/passwd")],
            "absolute path",
        ),
        refers(
            "parent folder",
            &[("location", "../outside/secret")],
            "contains `..`",
        ),
        refers(
            "parent folder inside",
            &[("location", "sub/../../outside/secret")],
            "contains `..`",
        ),
        refers("NUL", &[("location", "w.bin\0")], "NUL"),
        refers("no name", &[("location", "")], "names no file"),
        refers("dot", &[("location", ".")], "names no file"),
        refers("trailing slash", &[("location", "w.bin/")], "names no file"),
        refers("missing file", &[("location", "v.bin")], "missing"),
        refers("file as folder", &[("location", "w.bin/v.bin")], "missing"),
        files(
            "link out",
            |d| link("../outside/secret", d, "link"),
            LINKED,
            "leads out",
        ),
        files(
            "absolute link",
            |d| link("/etc/passwd", d, "link"),
            LINKED,
            "leads out",
        ),
        files(
            "link to a link out",
            |d| {
                link("../outside/secret", d, "second");
                link("second", d, "link");
            },
            LINKED,
            "leads out",
        ),
        files(
            "folder link out",
            |d| link("../outside", d, "away"),
            &[("location", "away/secret")],
            "leads out",
        ),
        files(
            "link to itself",
            |d| link("link", d, "link"),
            LINKED,
            "leads out",
        ),
        files(
            "link to proc",
            |d| link("/proc/self/environ", d, "link"),
            LINKED,
            "leads out",
        ),
        files(
            "dangling link",
            |d| link("nowhere", d, "link"),
            LINKED,
            "missing",
        ),
        files(
            "hard link",
            |d| {
                fs::hard_link(d.join("../outside/secret"), d.join("link")).unwrap();
            },
            LINKED,
            "2 hard links",
        ),
        files(
            "folder",
            |d| fs::create_dir(d.join("link")).unwrap(),
            LINKED,
            "not a regular file",
        ),
        files(
            "FIFO",
            |d| {
                let mode = rustix::fs::Mode::RWXU;
                let kind = rustix::fs::FileType::Fifo;
                rustix::fs::mknodat(rustix::fs::CWD, d.join("link"), kind, mode, 0).unwrap();
            },
            LINKED,
            "not a regular file",
        ),
        files(
            "socket",
            |d| {
                drop(std::os::unix::net::UnixListener::bind(d.join("link")).unwrap());
            },
            LINKED,
            "not a regular file",
        ),
        refers("no location", &[("offset", "0")], "no location"),
        refers(
            "unknown key",
            &[("location", "w.bin"), ("basepath", "/")],
            "unknown key",
        ),
        refers(
            "location twice",
            &[("location", "w.bin"), ("location", "/etc/passwd")],
            "twice",
        ),
        refers(
            "negative offset",
            &[("location", "w.bin"), ("offset", "-4")],
            "not a number",
        ),
        refers(
            "offset beyond u64",
            &[("location", "w.bin"), ("offset", "18446744073709551616")],
            "not a number",
        ),
        refers(
            "offset that wraps",
            &[("location", "w.bin"), ("offset", "18446744073709551612")],
            "has only 16 bytes",
        ),
        refers(
            "offset past the end",
            &[("location", "w.bin"), ("offset", "1")],
            "has only 16 bytes",
        ),
        refers(
            "huge length",
            &[("location", "w.bin"), ("length", "9223372036854775807")],
            "takes 16",
        ),
        refers(
            "short length",
            &[("location", "w.bin"), ("length", "12")],
            "takes 16",
        ),
        files(
            "short file",
            |d| fs::write(d.join("w.bin"), [0; 15]).unwrap(),
            PLAIN.entries,
            "has only 15 bytes",
        ),
        files(
            "empty file",
            |d| fs::write(d.join("w.bin"), []).unwrap(),
            PLAIN.entries,
            "has only 0 bytes",
        ),
        shaped("negative dim", &[-4], "negative"),
        shaped("two negative dims", &[-2, -2], "negative"),
        shaped("dims that overflow", &[1 << 33, 1 << 31], "more elements"),
        shaped(
            "dims that wrap to 16 bytes",
            &[1 << 32, 1 << 32, 4],
            "more elements",
        ),
        shaped("bytes that overflow", &[i64::MAX], "more elements"),
        shaped("too many elements", &[5], "takes 20"),
    ]
}

/// Writes the case's files and opens the model, whose only external tensor is `e`.
fn open(case: &Case, root: &Path) -> OnnxFile {
    let outside = root.join("outside");
    let dir = root.join("model");
    for folder in [&outside, &dir, &dir.join("sub")] {
        fs::create_dir(folder).unwrap();
    }
    fs::write(outside.join("secret"), [7; 16]).unwrap();
    fs::write(dir.join("w.bin"), [1; 16]).unwrap();
    (case.prepare)(&dir);
    let mut model = small_model(4);
    let tensor = TensorProto {
        name: Some("e".into()),
        data_type: Some(ElementType::F32.onnx()),
        dims: case.dims.to_vec(),
        data_location: Some(1),
        external_data: case
            .entries
            .iter()
            .map(|(k, v)| make::metadata(k, v))
            .collect(),
        ..TensorProto::default()
    };
    model.graph.get_or_insert_default().initializer.push(tensor);
    let path = dir.join("model.onnx");
    fs::write(&path, model.encode_to_vec()).unwrap();
    OnnxFile::open(&path).unwrap()
}

fn external_tensor(file: &OnnxFile) -> &TensorProto {
    file.model.graph.initializer.last().unwrap()
}

#[test]
fn malformed_references_are_refused_everywhere() {
    let mut wrong = Vec::new();
    for case in malformed() {
        let root = TempDir::new().unwrap();
        let file = open(&case, root.path());
        let read = file.tensor_bytes(external_tensor(&file)).err();
        let checked = check_model(&file.model, Some(&file)).err();
        let checked = checked.and_then(|problems| problems.into_iter().next());
        let out = root.path().join("out.onnx");
        let options = WriteOptions {
            external: ExternalData::Copy,
            ..WriteOptions::default()
        };
        let written = stage(&file.model, Some(&file), &out, &options).err();
        let answers = [
            read.map(|e| e.to_string()),
            checked.map(|e| e.to_string()),
            written.map(|e| e.to_string()),
        ];
        for answer in answers {
            let answer = answer.unwrap_or_else(|| "accepted".to_owned());
            if !(answer.contains(case.expected) && answer.contains("tensor `e`")) {
                wrong.push(format!("{}: {answer}", case.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn references_in_order_are_followed() {
    let refers = |name, entries| Case {
        name,
        entries,
        ..PLAIN
    };
    let mut wrong = Vec::new();
    for case in [
        PLAIN,
        refers("location only", &[("location", "w.bin")]),
        refers("dot in front", &[("location", "./w.bin")]),
        refers(
            "checksum",
            &[("location", "w.bin"), ("checksum", "da39a3ee")],
        ),
        Case {
            name: "folder",
            prepare: |d| fs::write(d.join("sub/w.bin"), [1; 16]).unwrap(),
            entries: &[("location", "sub/w.bin")],
            ..PLAIN
        },
        Case {
            name: "link inside",
            prepare: |d| link("../w.bin", &d.join("sub"), "link"),
            entries: &[("location", "sub/link")],
            ..PLAIN
        },
        Case {
            name: "offset",
            prepare: |d| fs::write(d.join("w.bin"), [[0; 16], [1; 16]].concat()).unwrap(),
            entries: &[("location", "w.bin"), ("offset", "16"), ("length", "16")],
            ..PLAIN
        },
    ] {
        let root = TempDir::new().unwrap();
        let file = open(&case, root.path());
        match file.tensor_bytes(external_tensor(&file)) {
            Ok(bytes) if bytes == [1; 16][..] => {}
            other => wrong.push(format!("{}: {other:?}", case.name)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The hop that the Hugging Face cache needs must not become a way out.
#[test]
fn links_beside_a_linked_model() {
    let root = TempDir::new().unwrap();
    let case = Case {
        prepare: |_| {},
        entries: LINKED,
        ..PLAIN
    };
    drop(open(&case, root.path()));
    let snapshot = root.path().join("snapshot");
    fs::create_dir(&snapshot).unwrap();
    link("../model/model.onnx", &snapshot, "model.onnx");
    let bytes = || {
        let file = OnnxFile::open(snapshot.join("model.onnx")).unwrap();
        file.tensor_bytes(external_tensor(&file))
            .map_err(|e| e.to_string())
    };
    assert!(bytes().unwrap_err().contains("missing"));
    for (target, expected) in [
        ("../model/w.bin", Ok(())),
        ("../outside/secret", Err("leads out")),
        ("../model/../outside/secret", Err("leads out")),
        ("../model/sub/../w.bin", Ok(())),
        ("../model/sub", Err("not a regular file")),
        ("../model/away", Err("leads out")),
        ("../model/w2.bin", Err("hard links")),
    ] {
        let _ = fs::remove_file(snapshot.join("link"));
        let _ = fs::remove_file(root.path().join("model/away"));
        link(target, &snapshot, "link");
        link("../outside/secret", &root.path().join("model"), "away");
        if target.ends_with("w2.bin") {
            let secret = root.path().join("outside/secret");
            fs::hard_link(secret, root.path().join("model/w2.bin")).unwrap();
        }
        match (bytes(), expected) {
            (Ok(bytes), Ok(())) => assert_eq!(bytes, [1; 16][..], "{target}"),
            (Err(error), Err(words)) => assert!(error.contains(words), "{target}: {error}"),
            other => panic!("{target}: {other:?}"),
        }
    }
}

#[test]
fn a_data_file_replaced_meanwhile_is_noticed() {
    let root = TempDir::new().unwrap();
    let file = open(&PLAIN, root.path());
    assert!(file.tensor_bytes(external_tensor(&file)).is_ok());
    let data = root.path().join("model/w.bin");
    fs::write(data.with_extension("new"), [9; 16]).unwrap();
    fs::rename(data.with_extension("new"), &data).unwrap();
    let options = WriteOptions {
        external: ExternalData::Copy,
        ..WriteOptions::default()
    };
    let error = stage(
        &file.model,
        Some(&file),
        &root.path().join("out.onnx"),
        &options,
    )
    .unwrap_err();
    assert!(error.to_string().contains("w.bin was changed"), "{error}");
}

#[test]
fn cut_anywhere_a_model_is_an_error_or_still_in_order() {
    let root = TempDir::new().unwrap();
    let bytes = small_model(40).encode_to_vec();
    let path = root.path().join("cut.onnx");
    let mut accepted = 0;
    for length in 0..bytes.len() {
        fs::write(&path, &bytes[..length]).unwrap();
        // A cut between two fields is valid protobuf; the check then finds what
        // is missing, or the last field was not needed.
        if let Ok(file) = OnnxFile::open(&path)
            && check_model(&file.model, Some(&file)).is_ok()
        {
            accepted += 1;
        }
    }
    assert_eq!(accepted, 0);
}
