//! `reeve reload` for people.

use crate::admin::ReloadReport;

/// One line for each part, and one for each refusal.
pub(super) fn render(report: &ReloadReport) -> String {
    let mut text = String::new();
    for part in &report.parts {
        text.push_str(&part.what);
        if !part.detail.is_empty() {
            text.push_str(&format!(": read, {}", part.detail));
        }
        text.push('\n');
        for refused in &part.refused {
            text.push_str(&format!("  REFUSED: {refused}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_refused_is_told_beside_what_was_read() {
        let mut report = ReloadReport::default();
        report.push("certificates", Ok("2 of 2".into()));
        report.push("policies", Err(vec!["a.yaml:1:1: is not a policy".into()]));
        assert_eq!(
            render(&report),
            "certificates: read, 2 of 2\npolicies\n  REFUSED: \
             a.yaml:1:1: is not a policy\n"
        );
        assert!(!report.is_accepted());
    }
}
