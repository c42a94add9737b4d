use std::fs::{self, File};
use std::io::BufReader;

use super::*;
use crate::image::{Parameters, read};

fn picture(width: u32, height: u32) -> Rgb {
    let count = width as usize * height as usize * 3;
    let bytes = (0..count).map(|i| (i * 7 + i / 251) as u8).collect();
    Rgb::new(width, height, bytes).unwrap()
}

fn texts() -> Metadata {
    let parameters = Parameters {
        prompt: "a \"red\" house, snow\nand wind".to_owned(),
        negative_prompt: "灯台, été".to_owned(),
        ..Parameters::default()
    };
    let mut metadata = Metadata::default();
    metadata.push("Title", "été, \"quoted\"\nline").unwrap();
    metadata.push("parameters", parameters.to_string()).unwrap();
    metadata.push("Software", "linfusion").unwrap();
    metadata
}

#[test]
fn rows_that_come_in_parts_are_read_back() {
    let folder = tempfile::tempdir().unwrap();
    for (name, width, height) in [
        ("a.png", 61, 47),
        ("a.tif", 61, 47),
        ("b.TIFF", 1, 1),
        ("b.PNG", 1, 1),
        ("wide.png", 16384, 16),
        ("wide.tiff", 16384, 16),
        ("high.tif", 3, 70000),
    ] {
        let path = folder.path().join(name);
        let image = picture(width, height);
        let mut writer = RowWriter::create(&path, width, height, &texts()).unwrap();
        let mut rows = image.rows();
        let mut part = 0;
        while rows.len() > 0 {
            let bytes: Vec<u8> = rows.by_ref().take(part % 7).flatten().copied().collect();
            writer.write_rows(&bytes).unwrap();
            part += 1;
        }
        writer.finish(Overwrite::Force).unwrap();
        assert!(read(&path).unwrap() == image, "{name}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 7);
}

#[test]
fn only_the_file_that_was_asked_for_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nowhere/a.png");
    let error = check_output(&path, Overwrite::Refuse).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot write {}: No such file or directory (os error 2); make its folder first",
            path.display()
        )
    );
}

#[test]
fn a_png_has_the_texts_in_the_chunks_that_hold_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    picture(4, 4).write(&path, &texts()).unwrap();
    let file = BufReader::new(File::open(&path).unwrap());
    let reader = ::png::Decoder::new(file).read_info().unwrap();
    let info = reader.info();
    let latin: Vec<_> = info
        .uncompressed_latin1_text
        .iter()
        .map(|t| (t.keyword.as_str(), t.text.as_str()))
        .collect();
    let texts = texts();
    let title = texts.get("Title").unwrap();
    assert_eq!(latin, [("Title", title), ("Software", "linfusion")]);
    let [other] = info.utf8_text.as_slice() else {
        panic!("{:?}", info.utf8_text);
    };
    assert_eq!(other.keyword, "parameters");
    assert_eq!(other.get_text().unwrap(), texts.get("parameters").unwrap());
}

#[test]
fn a_tiff_has_the_texts_in_its_directory() {
    use ::tiff::{decoder::Decoder, tags::Tag};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tif");
    picture(4, 4).write(&path, &texts()).unwrap();
    let mut decoder = Decoder::new(BufReader::new(File::open(&path).unwrap())).unwrap();
    let software = decoder.get_tag_ascii_string(Tag::Software).unwrap();
    assert_eq!(software, "linfusion");
    let description = decoder.get_tag_ascii_string(Tag::ImageDescription).unwrap();
    let texts = texts();
    let (title, parameters) = (texts.get("Title"), texts.get("parameters"));
    assert_eq!(
        description,
        format!(
            "Title: {}\nparameters: {}",
            title.unwrap(),
            parameters.unwrap()
        )
    );
}

#[test]
fn more_or_fewer_rows_than_promised_are_errors_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.png", "a.tif"] {
        let path = folder.path().join(name);
        let begin = || RowWriter::create(&path, 2, 3, &Metadata::default()).unwrap();
        let mut writer = begin();
        writer.write_rows(&[0; 12]).unwrap();
        assert!(matches!(
            writer.write_rows(&[0; 12]),
            Err(ImageError::Rows {
                expected: 3,
                found: 4,
                ..
            })
        ));
        assert!(matches!(
            writer.write_rows(&[0; 5]),
            Err(ImageError::PartOfRow { row: 6, found: 5 })
        ));
        assert!(matches!(
            writer.finish(Overwrite::Force),
            Err(ImageError::Rows {
                expected: 3,
                found: 2,
                ..
            })
        ));
        let mut writer = begin();
        writer.write_rows(&[0; 18]).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_file_is_replaced_only_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    fs::write(&path, "old").unwrap();
    let image = picture(3, 2);
    let mut writer = RowWriter::create(&path, 3, 2, &Metadata::default()).unwrap();
    writer.write_rows(image.bytes()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    writer.finish(Overwrite::Force).unwrap();
    assert_eq!(read(&path).unwrap(), image);
}

#[test]
#[cfg(unix)]
fn an_image_is_as_readable_as_other_files() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let mode = |name: &str| {
        let data = fs::metadata(folder.path().join(name)).unwrap();
        data.permissions().mode()
    };
    fs::write(folder.path().join("other"), "").unwrap();
    let path = folder.path().join("a.tif");
    picture(1, 1).write(&path, &Metadata::default()).unwrap();
    assert_eq!(mode("a.tif"), mode("other"));
}

#[test]
fn what_cannot_be_written_is_said_at_the_begin() {
    let folder = tempfile::tempdir().unwrap();
    let says = |name: &str, width, height, part: &str| {
        let path = folder.path().join(name);
        let error = RowWriter::create(&path, width, height, &Metadata::default()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(part), "{message}");
    };
    says("a.jpg", 1, 1, "`jpg`; name it *.png, *.tif or *.tiff");
    says("png", 1, 1, "extension ``");
    says("a.png", 0, 1, "at least 1");
    says("a.tif", 1, 0, "at least 1");
    says("a.png", 1 << 31, 1, "2147483647");
    says("a.tif", 1, u32::MAX, "2147483647");
    says("a.png", i32::MAX as u32, i32::MAX as u32, "2^60");
    says("missing/a.png", 1, 1, "make its folder first");
    fs::create_dir(folder.path().join("b.png")).unwrap();
    says("b.png", 1, 1, "a folder has that name");
}

/// Small images reach the file only at the end, where the PNG encoder itself says nothing of what failed.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_an_error_even_at_the_last_byte() {
    let full = || Sink::new(File::options().write(true).open("/dev/full").unwrap());
    let sink = full();
    let image = picture(600, 900);
    let written = Body::begin(Format::Tiff, &sink, 600, 900, &Metadata::default())
        .and_then(|mut body| body.write(image.bytes()).and_then(|()| body.finish()));
    let error = ImageError::write(Path::new("a.tif"), sink.cause(written.unwrap_err()));
    assert!(error.to_string().contains("free space"), "{error}");

    let sink = full();
    assert!(Body::begin(Format::Png, &sink, 1, 1, &Metadata::default()).is_err());

    // Only what follows the header meets the full disk.
    let (mut reader, writer) = std::io::pipe().unwrap();
    let sink = Sink::new(File::from(std::os::fd::OwnedFd::from(writer)));
    let mut body = Body::begin(Format::Png, &sink, 1, 1, &Metadata::default()).unwrap();
    body.write(&[1, 2, 3]).unwrap();
    std::io::Read::read_exact(&mut reader, &mut [0; 8]).unwrap();
    drop(reader);
    let error = sink.cause(body.finish().unwrap_err());
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

/// Of two that were begun under one name, one is written.
#[test]
fn what_came_meanwhile_is_not_replaced_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    let begun = || {
        let mut writer = RowWriter::create(&path, 1, 1, &Metadata::default()).unwrap();
        writer.write_rows(&[1, 2, 3]).unwrap();
        writer
    };
    let writers = [begun(), begun(), begun()];
    let [first, second, third] = writers;
    first.finish(Overwrite::Refuse).unwrap();
    let error = second.finish(Overwrite::Refuse).unwrap_err();
    assert!(matches!(error, ImageError::Exists { .. }), "{error}");
    third.finish(Overwrite::Force).unwrap();
    assert_eq!(folder.path().read_dir().unwrap().count(), 1);
}
