//! What a scalar means, by the core schema of YAML 1.2 (section 10.3).

/// The meaning of a scalar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scalar<'a> {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(&'a str),
    /// Digits after a zero, as in `0120`: 120 in YAML 1.2, and 80 in YAML 1.1, which other tools
    /// read. So it is a mistake wherever it is read.
    LeadingZero,
}

fn has_leading_zero(digits: &str) -> bool {
    digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit())
}

// === impl Scalar ===

impl<'a> Scalar<'a> {
    /// Reads a scalar; only a plain one, without quotes, can be anything but a text.
    pub(super) fn resolve(text: &'a str, plain: bool) -> Self {
        if !plain {
            return Self::Text(text);
        }
        match text {
            "" | "~" | "null" | "Null" | "NULL" => return Self::Null,
            "true" | "True" | "TRUE" => return Self::Bool(true),
            "false" | "False" | "FALSE" => return Self::Bool(false),
            _ => {}
        }
        Self::number(text).unwrap_or(Self::Text(text))
    }

    fn number(text: &str) -> Option<Self> {
        let radix = |digits, radix| u64::from_str_radix(digits, radix).ok().map(Self::Unsigned);
        let digits_only = |digits: &str| digits.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(digits) = text.strip_prefix("0x").filter(|d| digits_only(d)) {
            return radix(digits, 16);
        }
        if let Some(digits) = text.strip_prefix("0o").filter(|d| digits_only(d)) {
            return radix(digits, 8);
        }
        // Leaves out what Rust reads as a float and YAML does not, `inf` and `nan` among them.
        let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
        let starts_as_number = digits
            .strip_prefix('.')
            .unwrap_or(digits)
            .starts_with(|c: char| c.is_ascii_digit());
        if !starts_as_number {
            return None;
        }
        if has_leading_zero(digits) {
            return Some(Self::LeadingZero);
        }
        if let Ok(number) = text.parse() {
            return Some(Self::Unsigned(number));
        }
        if let Ok(number) = text.parse() {
            return Some(Self::Signed(number));
        }
        text.parse().ok().map(Self::Float)
    }
}

#[cfg(test)]
mod tests {
    use super::Scalar;

    #[test]
    fn a_plain_scalar_means_what_the_core_schema_says() {
        for (text, scalar) in [
            ("", Scalar::Null),
            ("~", Scalar::Null),
            ("null", Scalar::Null),
            ("true", Scalar::Bool(true)),
            ("False", Scalar::Bool(false)),
            ("yes", Scalar::Text("yes")),
            ("off", Scalar::Text("off")),
            ("80", Scalar::Unsigned(80)),
            ("+80", Scalar::Unsigned(80)),
            ("-80", Scalar::Signed(-80)),
            ("0x10", Scalar::Unsigned(16)),
            ("0o17", Scalar::Unsigned(15)),
            ("0x", Scalar::Text("0x")),
            ("0", Scalar::Unsigned(0)),
            ("0120", Scalar::LeadingZero),
            ("-01", Scalar::LeadingZero),
            ("00", Scalar::LeadingZero),
            ("0.5", Scalar::Float(0.5)),
            ("1.5", Scalar::Float(1.5)),
            ("1e3", Scalar::Float(1000.0)),
            ("1.2.3", Scalar::Text("1.2.3")),
            ("inf", Scalar::Text("inf")),
            ("nan", Scalar::Text("nan")),
            ("10.0.0.1", Scalar::Text("10.0.0.1")),
            ("4MiB", Scalar::Text("4MiB")),
        ] {
            assert_eq!(Scalar::resolve(text, true), scalar, "{text}");
            assert_eq!(Scalar::resolve(text, false), Scalar::Text(text));
        }
    }
}
