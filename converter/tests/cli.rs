//! The command line as a new user meets it: exit codes, messages, files.

use std::path::Path;
use std::process::Output;

use assert_cmd::Command;
use buffa::Message;
use linfusion_models::fixtures;
use linfusion_models::onnx::ExternalRef;
use linfusion_models::onnx::proto::ModelProto;

fn linfusion(args: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_linfusion-convert"))
        .args(args)
        .current_dir(folder)
        .env("HF_HUB_CACHE", folder.join("no-cache"))
        .output()
        .expect("linfusion-convert starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn folder_with_model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        fixtures::path("sd15-tiny/unet.onnx"),
        folder.path().join("unet.onnx"),
    )
    .unwrap();
    folder
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn without_weights_nothing_is_written_and_three_ways_are_shown() {
    let folder = folder_with_model();
    let out = linfusion(&["unet.onnx"], folder.path());
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
    let message = text(&out.stderr);
    for way in [
        "--weights FOLDER-OR-FILE",
        "hf download Yuanshi/LinFusion-1-5",
        "--weights none",
    ] {
        assert!(message.contains(way), "{message}");
    }
    assert_eq!(files(folder.path()), ["unet.onnx"]);
}

#[test]
fn finds_the_checkpoint_beside_the_model_and_writes_beside_it() {
    let folder = folder_with_model();
    let weights = folder.path().join("linfusion");
    std::fs::create_dir(&weights).unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        std::fs::copy(
            fixtures::path("sd15-tiny/linfusion").join(file),
            weights.join(file),
        )
        .unwrap();
    }
    let out = linfusion(&["unet.onnx", "--report", "json"], folder.path());
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["converted"], 16);
    assert_eq!(report["weights"], "checkpoint");
    assert_eq!(
        files(folder.path()),
        ["linfusion", "unet.linfusion.onnx", "unet.onnx"]
    );

    let again = linfusion(&["unet.onnx"], folder.path());
    assert_eq!(
        again.status.code(),
        Some(1),
        "an existing output is not replaced"
    );
    assert!(
        text(&again.stderr).contains("unet.linfusion.onnx"),
        "{}",
        text(&again.stderr)
    );
    let twice = linfusion(&["unet.linfusion.onnx"], folder.path());
    assert_eq!(twice.status.code(), Some(5), "{}", text(&twice.stderr));
    let verified = linfusion(&["verify", "unet.linfusion.onnx"], folder.path());
    assert_eq!(
        verified.status.code(),
        Some(0),
        "{}",
        text(&verified.stderr)
    );
    let forced = linfusion(&["unet.onnx", "--force"], folder.path());
    let said = text(&forced.stdout);
    assert!(
        said.contains("weights found: ")
            && said.contains("linfusion/diffusion_pytorch_model.safetensors"),
        "{said}"
    );
}

#[test]
fn verify_says_whose_weights_a_file_has() {
    let folder = folder_with_model();
    let weights = fixtures::path("sd15-tiny/linfusion");
    let weights = weights.to_str().unwrap();
    let run = |args: &[&str]| linfusion(args, folder.path());
    for (weights, out) in [(weights, "own.onnx"), ("none", "none.onnx")] {
        let made = run(&["unet.onnx", "--weights", weights, "-o", out]);
        assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    }
    let own = run(&["verify", "own.onnx", "--weights", weights]);
    assert_eq!(own.status.code(), Some(0), "{}", text(&own.stderr));
    let said = text(&own.stdout);
    assert!(
        said.contains("weights of 16 sites compared with") && said.contains(weights),
        "{said}"
    );
    let alone = text(&run(&["verify", "own.onnx"]).stdout);
    assert!(alone.contains("weights not compared"), "{alone}");

    // The graph's own projections are no checkpoint's.
    let none = run(&["verify", "none.onnx", "--weights", weights]);
    let said = text(&none.stderr);
    assert_eq!(none.status.code(), Some(6), "{said}");
    assert!(said.contains("16 of 16 sites have other weights"), "{said}");
    assert!(
        said.contains("down_blocks.0.attentions.0.transformer_blocks.0.attn1: it has none"),
        "{said}"
    );

    // Another checkpoint of the same model: a line a site at most, and few of them.
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let file = "diffusion_pytorch_model.safetensors";
    std::fs::copy(
        Path::new(weights).join("config.json"),
        other.join("config.json"),
    )
    .unwrap();
    let mut bytes = std::fs::read(Path::new(weights).join(file)).unwrap();
    let begin = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    // The last bit of every value's mantissa.
    bytes[begin..].iter_mut().step_by(4).for_each(|b| *b ^= 1);
    std::fs::write(other.join(file), bytes).unwrap();
    let wrong = run(&["verify", "own.onnx", "--weights", "other"]);
    let said = text(&wrong.stderr);
    assert_eq!(wrong.status.code(), Some(6), "{said}");
    assert!(
        said.lines().count() <= 10 && said.contains("and 8 more"),
        "{said}"
    );
    assert!(
        said.contains("more are no tensors of the checkpoint's module"),
        "{said}"
    );
}

#[test]
fn windows_alone_have_no_weights_to_compare() {
    let folder = tempfile::tempdir().unwrap();
    let case = fixtures::path("hybrid-pixart");
    let model = fixtures::bytes("hybrid-pixart/model.onnx.gz").unwrap();
    std::fs::write(folder.path().join("t.onnx"), model).unwrap();
    let run = |args: &[&str]| linfusion(args, folder.path());
    let made = run(&[
        "t.onnx",
        "--attention",
        "window",
        "--window",
        "3",
        "-o",
        "w.onnx",
    ]);
    assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    let weights = case.join("linfusion");
    let verified = run(&["verify", "w.onnx", "--weights", weights.to_str().unwrap()]);
    let said = text(&verified.stderr);
    assert_eq!(verified.status.code(), Some(6), "{said}");
    assert!(
        said.contains("it has none of the checkpoint's weights"),
        "{said}"
    );
}

/// FLUX's image is cut out by ids, which no probe knows; both branches of a hybrid site are one site.
#[test]
fn every_hybrid_site_beside_text_is_verified() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixtures::bytes("hybrid-flux/model.onnx.gz").unwrap();
    std::fs::write(folder.path().join("flux.onnx"), model).unwrap();
    let weights = fixtures::path("hybrid-flux/linfusion");
    let weights = weights.to_str().unwrap();
    let made = linfusion(&["flux.onnx", "--weights", weights], folder.path());
    assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    let verify = ["verify", "flux.linfusion.onnx", "--weights", weights];
    let verified = linfusion(&verify, folder.path());
    assert_eq!(
        verified.status.code(),
        Some(0),
        "{}",
        text(&verified.stderr)
    );
    let said = text(&verified.stdout);
    assert!(said.contains("4 of 4 sites run on"), "{said}");
    assert!(said.contains("weights of 4 sites compared"), "{said}");

    // A site whose branches are not added is not passed over.
    let path = folder.path().join("flux.linfusion.onnx");
    let mut model = ModelProto::decode_from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut nodes = model.graph.get_or_insert_default().node.iter_mut();
    let sum = nodes.find(|node| {
        node.name
            .as_deref()
            .is_some_and(|n| n.ends_with("/mix/Add"))
    });
    sum.unwrap().op_type = Some("Sub".to_owned());
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    let verified = linfusion(&["verify", "flux.linfusion.onnx"], folder.path());
    let said = text(&verified.stdout);
    assert!(said.contains("3 of 4 sites run on"), "{said}");
    assert!(said.contains("no Add reads"), "{said}");

    // Windows of standard operators are a loop, whose body reads values around it.
    let standard = ["--emit", "standard", "-o", "standard.onnx"];
    let args = [&["flux.onnx", "--weights", weights], &standard[..]].concat();
    let made = linfusion(&args, folder.path());
    let said = text(&made.stdout);
    assert!(said.contains("4 sites run on"), "{said}");
}

/// That says nothing of how it was converted.
#[test]
fn verify_names_a_data_file_that_is_missing() {
    let folder = folder_with_model();
    let made = linfusion(&["unet.onnx", "--weights", "none"], folder.path());
    assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    let path = folder.path().join("unet.linfusion.onnx");
    let mut model = ModelProto::decode_from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let outside = ExternalRef {
        location: "weights.bin".to_owned(),
        offset: 0,
        length: None,
    };
    outside.apply(&mut model.graph.get_or_insert_default().initializer[0]);
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    let verified = linfusion(&["verify", "unet.linfusion.onnx"], folder.path());
    let said = text(&verified.stderr);
    assert_eq!(verified.status.code(), Some(1), "{said}");
    assert!(
        said.contains("'unet.linfusion.onnx': tensor `") && said.contains("weights.bin"),
        "{said}"
    );
    assert!(!said.contains("please report"), "{said}");
}

/// Who names a library wants that one, and hears that it does not load.
#[test]
fn a_library_that_does_not_load_is_an_error_with_its_name() {
    let folder = folder_with_model();
    let made = linfusion(
        &["unet.onnx", "--weights", "none", "-o", "c.onnx"],
        folder.path(),
    );
    assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    for args in [
        &["verify", "c.onnx"][..],
        &["unet.onnx", "--weights", "none"],
        &["unet.onnx", "--resize", "32x32", "--attention", "keep"],
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_linfusion-convert"))
            .args(args)
            .current_dir(folder.path())
            .env("ORT_DYLIB_PATH", "/nowhere/libonnxruntime.so")
            .output()
            .unwrap();
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
        assert!(
            said.contains("/nowhere/libonnxruntime.so (from ORT_DYLIB_PATH)"),
            "{said}"
        );
    }
    assert_eq!(files(folder.path()), ["c.onnx", "unet.onnx"]);
}

#[test]
fn what_changes_nothing_is_told() {
    let folder = folder_with_model();
    let said = |args: &[&str], code: i32| {
        let out = linfusion(args, folder.path());
        let both = text(&out.stdout) + &text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {both}");
        both
    };
    let keep = said(&["unet.onnx", "--attention", "keep"], 2);
    assert!(
        keep.contains("leaves 'unet.onnx' as it is") && keep.contains("--resize"),
        "{keep}"
    );
    let window = [
        "unet.onnx",
        "--window",
        "8",
        "--weights",
        "none",
        "--dry-run",
    ];
    let unused = "the window that was asked for is not used";
    assert!(said(&window, 0).contains(unused));
    let inspected = said(&["inspect", "unet.onnx", "--window", "8"], 0);
    assert!(inspected.contains(unused), "{inspected}");
    assert!(
        inspected.contains("the MLPs of linear attention only with a checkpoint"),
        "{inspected}"
    );
    assert!(!said(&["unet.onnx", "--weights", "none", "-o", "c.onnx"], 0).contains(unused));
    let diff = said(&["diff", "unet.onnx", "c.onnx"], 0);
    let last = diff.lines().last().unwrap();
    assert!(
        last.starts_with("16 converted sites: ") && last.ends_with("nothing else differs"),
        "{last}"
    );
    let nothing = said(&["unet.onnx", "--keep", "*", "--weights", "none"], 4);
    assert!(!nothing.contains("--allow-partial accepts"), "{nothing}");
}

/// What stands in the way is told once, with the file's and the field's name.
#[test]
fn no_error_repeats_itself() {
    let folder = folder_with_model();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    std::fs::create_dir(folder.path().join("w")).unwrap();
    write("w/config.json", "{}");
    let weights = fixtures::path("sd15-tiny/linfusion/diffusion_pytorch_model.safetensors");
    std::fs::copy(
        weights,
        folder.path().join("w/diffusion_pytorch_model.safetensors"),
    )
    .unwrap();
    std::fs::write(folder.path().join("damaged.onnx"), [0xff; 32]).unwrap();
    write(
        "spec.json",
        r#"{"sample": {"uniform": {"min": 1}, "shape": [1, 4, 16, 16]}}"#,
    );
    write("odd.json", r#"{"sample": {"wide": {}}}"#);
    std::fs::create_dir(folder.path().join("taken.onnx")).unwrap();
    let spec = |name: &'static str| ["distill", "unet.onnx", "-o", "x", "--random", name];
    for (args, says) in [
        (
            &["missing.onnx"][..],
            "missing.onnx cannot be read: No such file",
        ),
        (&["damaged.onnx"], "damaged.onnx is not an ONNX model"),
        (
            &["unet.onnx", "--weights", "w"],
            "w/config.json is unusable: field `modules_list` is missing",
        ),
        (
            &["unet.onnx", "--weights", "none", "-o", "no/x.onnx"],
            "cannot open the folder no: No such file",
        ),
        (
            &["unet.onnx", "--weights", "none", "--keep", "["],
            "--keep '['",
        ),
        #[cfg(feature = "distill")]
        (
            &spec("spec.json"),
            "spec.json: 'sample': uniform: field `max` is missing",
        ),
        #[cfg(feature = "distill")]
        (
            &spec("odd.json"),
            r#"odd.json: 'sample': is {"wide":{}}; expected an object with one of normal"#,
        ),
        #[cfg(feature = "distill")]
        (
            &spec("absent.json"),
            "absent.json: cannot be read: No such file",
        ),
    ] {
        let out = linfusion(args, folder.path());
        let said = text(&out.stderr);
        assert!(
            !out.status.success() && said.contains(says),
            "{args:?}: {said}"
        );
        let errors = [
            "No such file",
            "is missing",
            "invalid",
            "unclosed",
            "os error",
        ];
        for words in errors
            .into_iter()
            .chain(said.lines().filter(|l| l.len() > 3))
        {
            assert!(
                said.matches(words).count() <= 1,
                "{args:?} says '{words}' twice: {said}"
            );
        }
    }
}

#[test]
fn output_bytes_are_the_same_every_time() {
    let folder = folder_with_model();
    for name in ["a.onnx", "b.onnx"] {
        let out = linfusion(
            &["unet.onnx", "--weights", "none", "-o", name],
            folder.path(),
        );
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        assert!(
            text(&out.stderr).contains("untrained"),
            "{}",
            text(&out.stderr)
        );
    }
    let read = |n: &str| std::fs::read(folder.path().join(n)).unwrap();
    assert!(read("a.onnx") == read("b.onnx"));
}

#[test]
fn selection_and_dry_run() {
    let folder = folder_with_model();
    let converted = |args: &[&str]| -> u64 {
        let mut all = vec![
            "unet.onnx",
            "--weights",
            "none",
            "--dry-run",
            "--report",
            "json",
        ];
        all.extend(args);
        let out = linfusion(&all, folder.path());
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        report["converted"].as_u64().unwrap()
    };
    assert_eq!(converted(&[]), 16);
    assert_eq!(converted(&["--keep", "down_blocks.0.*"]), 14);
    assert_eq!(converted(&["--only", "mid_block.*"]), 1);
    assert_eq!(converted(&["--keep-every", "4"]), 12);
    assert_eq!(converted(&["--min-tokens", "4096"]), 5);
    assert_eq!(files(folder.path()), ["unet.onnx"]);
}

#[test]
fn wrong_inputs_have_messages_and_codes() {
    let folder = folder_with_model();
    std::fs::write(folder.path().join("empty.onnx"), b"").unwrap();
    std::fs::write(
        folder.path().join("lfs.onnx"),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )
    .unwrap();
    let mut failures = Vec::new();
    for (args, code, says) in [
        (&["missing.onnx"][..], 1, "missing.onnx"),
        (&["empty.onnx"], 1, "empty"),
        (&["lfs.onnx"], 1, "LFS"),
        (&["unet.onnx", "--weights", "nowhere"], 1, "nowhere"),
        (
            &["unet.onnx", "--keep", "[", "--weights", "none"],
            2,
            "--keep '[' is no pattern",
        ),
        (
            &["unet.onnx", "--only", "nothing", "--weights", "none"],
            2,
            "--only",
        ),
        (
            &["unet.onnx", "--keep", "*", "--weights", "none"],
            4,
            "kept by --keep",
        ),
        (
            &[
                "unet.onnx",
                "--weights",
                "none",
                "-o",
                "unet.onnx",
                "--force",
            ],
            1,
            "unet.onnx",
        ),
        (&["unet.onnx", "--emit", "nonsense"], 2, "nonsense"),
    ] {
        let out = linfusion(args, folder.path());
        let message = text(&out.stderr);
        if out.status.code() != Some(code) || !message.contains(says) {
            failures.push(format!(
                "{args:?}: code {:?}, not {code}, or no '{says}' in: {message}",
                out.status.code()
            ));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(
        files(folder.path()),
        ["empty.onnx", "lfs.onnx", "unet.onnx"],
        "nothing is left behind"
    );
}

#[test]
fn inspect_json_has_every_site_once() {
    let folder = folder_with_model();
    let out = linfusion(&["inspect", "unet.onnx", "--report", "json"], folder.path());
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["architecture"], "sd15");
    let sites = report["sites"].as_array().unwrap();
    assert_eq!(sites.len(), 32);
    for key in [
        "index", "module", "kind", "heads", "head_dim", "tokens", "action", "reason", "anchor",
    ] {
        assert!(sites.iter().all(|s| !s[key].is_null()), "{key}");
    }
}

#[test]
fn a_pipeline_is_converted_as_a_folder() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    fixtures::pipeline("sd15", &root.join("sd15")).unwrap();
    let weights = fixtures::path("sd15-tiny/linfusion");
    let weights = weights.to_str().unwrap();
    let output = linfusion(&["sd15", "--weights", weights], root);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(files(root), ["sd15", "sd15.linfusion"]);
    assert_eq!(
        files(&root.join("sd15.linfusion")),
        files(&root.join("sd15"))
    );
    assert_eq!(
        files(&root.join("sd15.linfusion/unet")),
        ["config.json", "model.onnx"]
    );
    let original = std::fs::read(root.join("sd15/unet/model.onnx")).unwrap();
    let converted = std::fs::read(root.join("sd15.linfusion/unet/model.onnx")).unwrap();
    assert!(text(&converted).contains("LinFusionAttention") && converted != original);
    // The links hold after both have moved together.
    std::fs::create_dir(root.join("moved")).unwrap();
    for name in ["sd15", "sd15.linfusion"] {
        std::fs::rename(root.join(name), root.join("moved").join(name)).unwrap();
    }
    let moved = root.join("moved/sd15.linfusion");
    assert!(moved.join("vae_decoder/model.onnx").is_file());
    assert!(moved.join("text_encoder").is_symlink());

    // What to type next is what was typed.
    let none = linfusion(&["sd15", "-o", "new"], &root.join("moved"));
    let said = text(&none.stderr);
    assert_eq!(none.status.code(), Some(3), "{said}");
    assert!(said.contains("no LinFusion weights for 'sd15'"), "{said}");
    assert!(said.contains("linfusion-convert sd15 --weights"), "{said}");

    // What is there stays as it is, or is replaced as a whole where that is asked for; never the original.
    std::fs::write(moved.join("mark"), "x").unwrap();
    std::fs::create_dir(root.join("moved/other")).unwrap();
    for (more, expected) in [
        (&[][..], "'sd15.linfusion' exists already; --force"),
        (&["-o", "sd15", "--force"], "'sd15' is the pipeline itself"),
        (
            &["-o", "sd15/new"],
            "'sd15/new' is the pipeline itself or in it",
        ),
        (
            &["-o", "other", "--force"],
            "'other' is no pipeline's folder",
        ),
    ] {
        let args = [&["sd15", "--weights", weights], more].concat();
        let again = linfusion(&args, &root.join("moved"));
        let said = text(&again.stderr);
        assert_eq!(again.status.code(), Some(1), "{said}");
        assert!(said.contains(expected), "{said}");
        assert!(moved.join("mark").is_file());
    }
    let args = ["sd15", "--weights", weights, "--force"];
    let forced = linfusion(&args, &root.join("moved"));
    assert_eq!(forced.status.code(), Some(0), "{}", text(&forced.stderr));
    assert!(text(&forced.stdout).contains("wrote sd15.linfusion/unet/model.onnx"));
    assert!(!moved.join("mark").exists());
    assert_eq!(
        std::fs::read(moved.join("unet/model.onnx")).unwrap(),
        converted
    );
    assert_eq!(
        files(&root.join("moved")),
        ["other", "sd15", "sd15.linfusion"]
    );
}

#[test]
fn a_folder_that_is_no_pipeline_is_refused_and_nothing_left() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path();
    fixtures::pipeline("sd15", &root.join("sd15")).unwrap();
    let failure = |what: &str, code: i32| {
        let output = linfusion(&["sd15", "-o", "new"], root);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
        assert!(
            text(&output.stderr).contains(what),
            "{}",
            text(&output.stderr)
        );
        assert_eq!(files(root), ["sd15"]);
    };
    failure("no LinFusion weights", 3);
    std::fs::remove_file(root.join("sd15/unet/model.onnx")).unwrap();
    failure("has no model.onnx", 1);
    std::fs::remove_dir_all(root.join("sd15/unet")).unwrap();
    failure("neither a folder unet nor transformer", 1);
    std::fs::remove_file(root.join("sd15/model_index.json")).unwrap();
    failure("without model_index.json", 1);
}

#[test]
fn a_resize_is_reported_and_a_dry_one_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixtures::bytes("terrain/terrain-fixed.onnx.gz").unwrap();
    std::fs::write(folder.path().join("terrain.onnx"), model).unwrap();
    let resize = |size: &str, more: &[&str]| {
        let args = ["terrain.onnx", "--attention", "keep", "--resize", size];
        linfusion(&[&args, more].concat(), folder.path())
    };
    let out = resize("dynamic", &["--dry-run", "--report", "json"]);
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["resized"]["from"], serde_json::json!([32, 32]));
    assert_eq!(report["resized"]["to"], "dynamic");
    assert_eq!(report["output"], serde_json::Value::Null);

    let out = resize("30x32", &[]);
    let message = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{message}");
    assert!(
        message.contains("30x32") && message.contains("multiples of 4"),
        "{message}"
    );
    assert_eq!(resize("48", &[]).status.code(), Some(2));
    assert_eq!(files(folder.path()), ["terrain.onnx"]);
}

#[cfg(feature = "distill")]
#[test]
fn weights_are_learned_and_used_in_one_go() {
    let folder = folder_with_model();
    let refused = |args: &[&str], expected: &str| {
        let out = linfusion(args, folder.path());
        assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
        assert!(
            text(&out.stderr).contains(expected),
            "{}",
            text(&out.stderr)
        );
        assert!(!files(folder.path()).iter().any(|f| f.contains("linfusion")));
    };
    refused(&["unet.onnx", "--weights", "distill"], "--random");
    refused(&["distill", "unet.onnx", "-o", "linfusion"], "--random");
    refused(&["inspect", "unet.onnx", "--attention", "auto"], "distill");
    let rate = ["distill", "unet.onnx", "-o", "w", "--end-to-end-lr", "1"];
    refused(&rate, "--end-to-end");
    let idle = ["unet.onnx", "--weights", "none", "--samples", "3"];
    refused(&idle, "--samples says how weights are learned");
    refused(
        &[
            "distill",
            "unet.onnx",
            "-o",
            "w",
            "--random",
            "s.json",
            "--mid-dim",
            "0",
        ],
        "auto",
    );
    let spec = r#"{"sample": {"normal": {}, "shape": [1, 4, 16, 16]},
        "timestep": {"integers": {"min": 0, "max": 999}},
        "encoder_hidden_states": {"normal": {}, "shape": [1, 7, 12]}}"#;
    std::fs::write(folder.path().join("spec.json"), spec).unwrap();
    let args = "unet.onnx --weights distill --random spec.json --samples 2 --holdout 1 --steps 1 --no-refine --report json";
    let args: Vec<&str> = args.split(' ').collect();
    let out = linfusion(&args, folder.path());
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["converted"], 16);
    assert_eq!(
        files(folder.path()),
        [
            "spec.json",
            "unet.linfusion-weights",
            "unet.linfusion.onnx",
            "unet.onnx"
        ]
    );
    // They are found beside the model, and not learned again unasked.
    let again = linfusion(&["unet.onnx", "--force"], folder.path());
    assert_eq!(again.status.code(), Some(0), "{}", text(&again.stderr));
    let said = text(&again.stdout);
    assert!(
        said.contains("weights found: ") && said.contains("unet.linfusion-weights/"),
        "{said}"
    );
}

/// A full disk behind a redirection, or nobody left who reads.
#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_printed_is_no_panic() {
    let folder = folder_with_model();
    let full = || std::fs::File::create("/dev/full").unwrap();
    let program = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_linfusion-convert"));
        command.args(args).current_dir(folder.path());
        command.env("HF_HUB_CACHE", folder.path().join("no-cache"));
        command
    };
    let status = program(&["unet.onnx"]).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(3));
    for (args, written) in [
        (&["inspect", "unet.onnx"][..], false),
        (&["unet.onnx", "--weights", "none"], true),
    ] {
        let output = program(args)
            .stdout(full())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .and_then(std::process::Child::wait_with_output)
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = text(&output.stderr);
        assert!(
            said.contains("error: writing to standard output: "),
            "{said}"
        );
        let file = "unet.linfusion.onnx";
        assert_eq!(
            said.contains(&format!("{file} was written")),
            written,
            "{said}"
        );
        assert_eq!(folder.path().join(file).exists(), written);
    }
}
