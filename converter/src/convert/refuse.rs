//! Models that are not converted: those that were already, and those of which less would be than they have.

use linfusion_models::onnx::proto::ModelProto;
use linfusion_ops::schema::WindowSpec;

use super::{ConvertError, Partial};
use crate::analysis::{Analysis, METADATA_KEY};
use crate::attention::kind::Kind;
use crate::plan::Action;
use crate::report::ModelReport;

/// # Errors
/// The model, called `name`, says of itself that it was converted, or holds what conversion writes.
pub(crate) fn refuse_converted(model: &ModelProto, name: &str) -> Result<(), ConvertError> {
    let recorded = model
        .metadata_props
        .iter()
        .find(|p| p.key.as_deref() == Some(METADATA_KEY));
    let has_node = model
        .graph
        .node
        .iter()
        .any(|n| n.domain.as_deref() == Some(linfusion_ops::schema::DOMAIN));
    if recorded.is_none() && !has_node {
        return Ok(());
    }
    let how = recorded
        .and_then(|p| p.value.clone())
        .unwrap_or_else(|| "it holds ai.linfusion nodes".to_owned());
    Err(ConvertError::AlreadyConverted {
        model: name.to_owned(),
        how,
    })
}

/// Sites the user chose to keep are no shortfall; sites that cannot be converted are.
pub(super) fn refuse_fewer(
    name: &str,
    analysis: &Analysis<'_>,
    actions: &[Action],
    partial: Partial,
) -> Result<(), ConvertError> {
    let converted = actions.iter().filter(|a| a.method().is_some()).count();
    let stuck: Vec<usize> = (0..actions.len())
        .filter(|&i| matches!(actions[i], Action::Cannot(_)))
        .collect();
    let unread = stuck
        .iter()
        .filter(|&&i| analysis.sites[i].kind == Kind::Other)
        .count();
    let expected = analysis
        .recognised
        .as_ref()
        .map_or(0, |r| r.expected_self() + r.expected_joint())
        .max(analysis.own_sites().count() + unread);
    let missing = analysis.own_sites().count() < expected;
    if converted > 0 && (partial == Partial::Allow || (stuck.is_empty() && !missing)) {
        return Ok(());
    }
    let line = |i: usize| {
        let s = &analysis.sites[i];
        let reason = actions[i].reason().unwrap_or_default();
        format!(
            "  {} [{}]: {reason}",
            s.module.as_deref().unwrap_or(&s.anchor),
            s.kind
        )
    };
    let mut shown: Vec<usize> = if stuck.is_empty() {
        (0..analysis.sites.len())
            .filter(|&i| actions[i].method().is_none())
            .collect()
    } else {
        stuck
    };
    let more = shown.len().saturating_sub(12);
    shown.truncate(12);
    let mut reasons = shown.into_iter().map(line).collect::<Vec<_>>().join("\n");
    if analysis.sites.is_empty() {
        reasons = "  the file has no Softmax and no attention operator".to_owned();
    }
    if more > 0 {
        reasons += &format!("\n  and {more} more (inspect shows all)");
    }
    Err(ConvertError::Fewer {
        model: name.to_owned(),
        converted,
        expected,
        reasons,
        report: Box::new(ModelReport::new(
            name,
            analysis,
            actions,
            WindowSpec::default(),
            0,
        )),
    })
}
