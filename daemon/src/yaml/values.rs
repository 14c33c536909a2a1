//! The values of fields, each with its own check and its own words for what it expects.

use std::{collections::BTreeMap, fmt, marker::PhantomData, net::IpAddr, time::Duration};

use ipnet::IpNet;
use serde::{
    Deserialize, Deserializer,
    de::{self, Visitor},
};

use super::shown;

/// Longest name (RFC 1123 gives 253 characters to a host's name, as Kubernetes does to its own).
const MAX_NAME_LENGTH: usize = 253;
/// Longest name or value of a label, as in Kubernetes.
const MAX_LABEL_LENGTH: usize = 63;

/// A name of a thing: letters, digits, `.`, `_` and `-`, with a letter or digit at both ends, so
/// that it can stand in a SPIFFE ID, in a metric's label and in a file's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Name(String);

/// Labels: keys and values have the form that Kubernetes gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Labels(pub(crate) BTreeMap<String, String>);

/// An address. IPv4 addresses in IPv6's notation are refused, so that each has one form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Ip(pub(crate) IpAddr);

/// An address or a network, as in `10.1.2.3` or `10.1.0.0/16`. No bit is set after the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Network(pub(crate) IpNet);

/// A port: 1 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Port(pub(crate) u16);

/// Name of a port (RFC 6335): at most 15 of `a-z`, `0-9` and `-`, at least one letter.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct PortName(pub(crate) String);

// === impl Name ===

impl Name {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.len() <= MAX_NAME_LENGTH && is_name(&text) {
            return Ok(Self(text));
        }
        Err(format!(
            "`{}` is not a name; expected 1 to {MAX_NAME_LENGTH} of `a-z`, `A-Z`, `0-9`, `.`, \
             `_`, `-`, with a letter or a digit first and last",
            shown(&text)
        ))
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

fn is_name(text: &str) -> bool {
    let end = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    end(text.chars().next())
        && end(text.chars().next_back())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

// === impl Labels ===

/// Checks the key of a label: a name, with a DNS name and a slash before it or not.
///
/// # Errors
/// What to tell the operator.
pub(crate) fn check_label_key(key: &str) -> Result<(), String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let good_prefix = prefix.is_none_or(|p| p.len() <= MAX_NAME_LENGTH && is_name(p));
    if good_prefix && name.len() <= MAX_LABEL_LENGTH && is_name(name) {
        return Ok(());
    }
    Err(format!(
        "`{}` is not the key of a label; expected at most {MAX_LABEL_LENGTH} of `a-z`, `A-Z`, \
         `0-9`, `.`, `_`, `-`, and where wanted `example.org/` before it",
        shown(key)
    ))
}

/// Checks the value of a label.
///
/// # Errors
/// What to tell the operator.
pub(crate) fn check_label_value(value: &str) -> Result<(), String> {
    if value.is_empty() || value.len() <= MAX_LABEL_LENGTH && is_name(value) {
        return Ok(());
    }
    Err(format!(
        "`{}` is not the value of a label; expected at most {MAX_LABEL_LENGTH} of `a-z`, `A-Z`, \
         `0-9`, `.`, `_`, `-`, with a letter or a digit first and last",
        shown(value)
    ))
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LabelsVisitor;
        impl<'de> Visitor<'de> for LabelsVisitor {
            type Value = Labels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("labels (`key: value`)")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Labels, A::Error> {
                let mut labels = BTreeMap::new();
                while let Some(LabelKey(key)) = map.next_key()? {
                    let LabelValue(value) = map.next_value()?;
                    labels.insert(key, value);
                }
                Ok(Labels(labels))
            }
        }
        deserializer.deserialize_map(LabelsVisitor)
    }
}

/// A label's key, checked.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct LabelKey(pub(crate) String);

/// A label's value, checked.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct LabelValue(pub(crate) String);

impl TryFrom<String> for LabelKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        check_label_key(&text).map(|()| Self(text))
    }
}

impl TryFrom<String> for LabelValue {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        check_label_value(&text).map(|()| Self(text))
    }
}

// === impl Ip and Network ===

impl TryFrom<String> for Ip {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let address: IpAddr = text.parse().map_err(|_| {
            format!(
                "`{}` is not an address; expected one as in `10.1.2.3` or `2001:db8::1`{}",
                shown(&text),
                address_hint(&text)
            )
        })?;
        one_form(address).map(Self)
    }
}

fn one_form(address: IpAddr) -> Result<IpAddr, String> {
    match address.to_canonical() {
        canonical if canonical == address => Ok(address),
        canonical => Err(format!(
            "`{address}` is an IPv4 address in IPv6's notation; write `{canonical}`"
        )),
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return one_form(address).map(|address| Self(address.into()));
        }
        let network = parse_network(&text).ok_or_else(|| {
            format!(
                "`{}` is neither an address nor a network; expected one as in `10.1.2.3`, \
                 `10.1.0.0/16` or `2001:db8::/32`{}",
                shown(&text),
                address_hint(&text)
            )
        })?;
        if one_form(network.addr()).is_err() {
            return Err(format!(
                "`{network}` is an IPv4 network in IPv6's notation; write it as IPv4"
            ));
        }
        if network.trunc() != network {
            return Err(format!(
                "`{network}` has bits set after its prefix; did you mean `{}`?",
                network.trunc()
            ));
        }
        Ok(Self(network))
    }
}

/// Reads a network. A number with a zero in front, which means one thing to `ipnet` and another to
/// other tools, makes it none.
pub(crate) fn parse_network(text: &str) -> Option<IpNet> {
    text.parse().ok().filter(|_| address_hint(text).is_empty())
}

/// What to add to a message about an address or a network that could not be read.
pub(crate) fn address_hint(text: &str) -> &'static str {
    let zero = |part: &str| {
        part.len() > 1 && part.starts_with('0') && part.bytes().all(|b| b.is_ascii_digit())
    };
    let address = text.split('/').next().unwrap_or(text);
    if address.split('.').any(zero) {
        "; a number in it has a zero in front, and other tools read that as an octal number"
    } else {
        ""
    }
}

/// What was meant by a text in the place of a port's number, as far as it can be told.
pub(crate) fn port_hint(text: &str) -> Option<String> {
    let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port != 0);
    if let Some(port) = port(text) {
        return Some(format!(
            "\"{}\" is a text; write {port} without quotes",
            shown(text)
        ));
    }
    let (first, last) = text.split_once(['-', ':'])?;
    let (first, last) = (port(first)?, port(last)?);
    Some(format!(
        "`{}` is no port; write a range as `port: {first}` and `endPort: {last}`",
        shown(text)
    ))
}

// === impl Port ===

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortVisitor;
        impl Visitor<'_> for PortVisitor {
            type Value = Port;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port from 1 to 65535, without quotes")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Port, E> {
                match u16::try_from(value) {
                    Ok(port) if port != 0 => Ok(Port(port)),
                    _ => Err(E::invalid_value(de::Unexpected::Unsigned(value), &self)),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Port, E> {
                Err(match port_hint(text) {
                    Some(hint) => E::custom(hint),
                    None => E::invalid_type(de::Unexpected::Str(text), &self),
                })
            }
        }
        deserializer.deserialize_any(PortVisitor)
    }
}

// === impl PortName ===

impl TryFrom<String> for PortName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let dashes = text.starts_with('-') || text.ends_with('-') || text.contains("--");
        let letter = text.contains(|c: char| c.is_ascii_lowercase());
        if (1..=15).contains(&text.len()) && text.chars().all(known) && letter && !dashes {
            return Ok(Self(text));
        }
        Err(format!(
            "`{}` is not the name of a port; expected at most 15 of `a-z`, `0-9`, `-`, with a \
             letter, as in `http`",
            shown(&text)
        ))
    }
}

/// Reads a port.
pub(crate) fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    Port::deserialize(deserializer).map(|port| port.0)
}

// === numbers, sizes, durations ===

struct Bounded<T, const MIN: u64, const MAX: u64> {
    size: bool,
    value: PhantomData<T>,
}

impl<T: TryFrom<u64>, const MIN: u64, const MAX: u64> Visitor<'_> for Bounded<T, MIN, MAX> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.size {
            write!(
                f,
                "a size from {MIN} to {MAX} bytes, as in `64KiB` or `4MiB`"
            )
        } else {
            write!(f, "a whole number from {MIN} to {MAX}")
        }
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<T, E> {
        let wrong = || E::invalid_value(de::Unexpected::Unsigned(value), &self);
        if !(MIN..=MAX).contains(&value) {
            return Err(wrong());
        }
        T::try_from(value).map_err(|_| wrong())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        let wrong = || E::invalid_value(de::Unexpected::Str(text), &self);
        let bytes = parse_size(text).filter(|_| self.size).ok_or_else(wrong)?;
        if !(MIN..=MAX).contains(&bytes) {
            return Err(wrong());
        }
        T::try_from(bytes).map_err(|_| wrong())
    }
}

/// Reads a whole number within bounds.
pub(crate) fn number<'de, D, T, const MIN: u64, const MAX: u64>(
    deserializer: D,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    deserializer.deserialize_any(Bounded::<T, MIN, MAX> {
        size: false,
        value: PhantomData,
    })
}

/// Reads a number of bytes within bounds: a number, or a text as in `4MiB`.
pub(crate) fn size<'de, D, T, const MIN: u64, const MAX: u64>(
    deserializer: D,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    deserializer.deserialize_any(Bounded::<T, MIN, MAX> {
        size: true,
        value: PhantomData,
    })
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    let unit: u64 = match unit.trim_start() {
        "" | "B" => 1,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

/// Longest duration that is accepted: sums with it stay far from overflow.
const MAX_DURATION: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Reads a duration, as in `30s` or `1h 30m`.
pub(crate) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = text_of(deserializer, "a duration, as in `30s`, `5m` or `1h 30m`")?;
    let duration = humantime::parse_duration(&text).map_err(|_| {
        de::Error::custom(format!(
            "`{}` is not a duration; expected one as in `30s`, `5m` or `1h 30m`",
            shown(&text)
        ))
    })?;
    if duration > MAX_DURATION {
        return Err(de::Error::custom(
            "expected a duration of at most ten years",
        ));
    }
    Ok(duration)
}

/// Reads a duration that is not zero.
pub(crate) fn positive_duration<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Duration, D::Error> {
    let duration = duration(deserializer)?;
    if duration.is_zero() {
        return Err(de::Error::custom(
            "found a duration of zero; expected a longer one, as in `30s`",
        ));
    }
    Ok(duration)
}

/// Reads a text whose absence has words of its own.
fn text_of<'de, D: Deserializer<'de>>(
    deserializer: D,
    expected: &'static str,
) -> Result<String, D::Error> {
    struct TextVisitor(&'static str);
    impl Visitor<'_> for TextVisitor {
        type Value = String;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
            Ok(text.to_owned())
        }
    }
    deserializer.deserialize_any(TextVisitor(expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_has_a_unit_or_is_in_bytes() {
        for (text, bytes) in [
            ("4MiB", Some(4 << 20)),
            ("64 KiB", Some(64 << 10)),
            ("1kB", Some(1000)),
            ("17", Some(17)),
            ("17B", Some(17)),
            ("MiB", None),
            ("4Mib", None),
            ("-1", None),
            ("1.5MiB", None),
            ("18446744073709551615GiB", None),
        ] {
            assert_eq!(parse_size(text), bytes, "{text}");
        }
    }

    #[test]
    fn a_network_has_one_form() {
        let network = |text: &str| Network::try_from(text.to_owned());
        assert_eq!(network("10.0.0.1").unwrap().0.to_string(), "10.0.0.1/32");
        assert_eq!(network("2001:db8::/32").unwrap().0.prefix_len(), 32);
        assert!(network("10.0.0.1/8").unwrap_err().contains("`10.0.0.0/8`"));
        assert!(network("::ffff:10.0.0.0/104").unwrap_err().contains("IPv4"));
        assert!(
            network("::ffff:10.0.0.1")
                .unwrap_err()
                .contains("`10.0.0.1`")
        );
        assert!(network("10.0.0.0/33").is_err());
        assert!(network("example.org").is_err());
    }

    #[test]
    fn names_and_labels_fit_where_they_are_used() {
        for good in ["a", "web-1", "Web.v2_x", &"a".repeat(253)] {
            assert!(Name::try_from(good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a b", "a/b", "ä", ".", &"a".repeat(254)] {
            assert!(Name::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        for good in ["app", "example.org/app", "app.kubernetes.io/name"] {
            assert!(check_label_key(good).is_ok(), "{good}");
        }
        for bad in ["", "/app", "a/b/c", "app/", &"a".repeat(64)] {
            assert!(check_label_key(bad).is_err(), "{bad}");
        }
        assert!(check_label_value("").is_ok());
        assert!(check_label_value("a b").is_err());
    }
}
