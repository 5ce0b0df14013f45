//! What an agent can be set to, and what it is set to: modes, models, options.
//!
//! The agent tells it in its answers (`session/new`, `session/load`, `session/set_config_option`) and
//! in updates. Its last word is kept with the session, so that it can be read while nothing runs and
//! set again after a resume.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::error::{Code, Error, Result};

/// ACP's categories of options.
const MODE: &str = "mode";
const MODEL: &str = "model";
const THOUGHT_LEVEL: &str = "thought_level";

/// The agent's last word about itself. JSON as it came, fields that we do not know included.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Configuration {
    /// `{ currentModeId, availableModes: [{ id, name, … }] }`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) modes: Option<Value>,
    /// `{ currentModelId, availableModels: [{ modelId, name, … }] }`, of agents that have no option
    /// for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    models: Option<Value>,
    /// `[{ id, category, type, currentValue, options, … }]`
    #[serde(skip_serializing_if = "Option::is_none")]
    config_options: Option<Vec<Value>>,
}

/// Bytes of modes, models or options that are kept, of each. It bounds what an agent can make this
/// process hold, and write with every change: a parsed value takes many times its text.
const MAX_BYTES: usize = 1 << 20;

/// The same as it comes. Whatever an agent sends in place of any of it may be of another shape.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Told<'a> {
    #[serde(borrow)]
    modes: Option<&'a RawValue>,
    #[serde(borrow)]
    models: Option<&'a RawValue>,
    #[serde(borrow)]
    config_options: Option<&'a RawValue>,
}

/// A change that an agent is asked for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Setting {
    pub(super) method: &'static str,
    /// Without `sessionId`.
    pub(super) params: Value,
    /// What it is, for a person.
    pub(super) what: String,
}

/// Methods whose success changes the configuration.
const SET_MODE: &str = "session/set_mode";
const SET_MODEL: &str = "session/set_model";
const SET_CONFIG_OPTION: &str = "session/set_config_option";

/// A change that an agent tells.
#[derive(Debug)]
pub(super) enum Observed {
    Mode(Value),
    Options(Vec<Value>),
}

impl Observed {
    /// `current_mode_update {currentModeId}`; `None`: it is not what it should be.
    pub(super) fn mode(id: Option<&RawValue>) -> Option<Self> {
        id.and_then(bounded)
            .filter(Value::is_string)
            .map(Self::Mode)
    }

    /// `config_option_update {configOptions}`, in the same way.
    pub(super) fn options(list: Option<&RawValue>) -> Option<Self> {
        list.and_then(options).map(Self::Options)
    }
}

fn bounded(raw: &RawValue) -> Option<Value> {
    let bytes = raw.get().len();
    if bytes > MAX_BYTES {
        tracing::warn!(bytes, "a configuration of an agent is too large to be kept");
        return None;
    }
    serde_json::from_str(raw.get()).ok()
}

/// Of a list of options those that are one.
fn options(raw: &RawValue) -> Option<Vec<Value>> {
    match bounded(raw)? {
        Value::Array(mut options) => {
            options.retain(Value::is_object);
            Some(options)
        }
        _ => None,
    }
}

impl Configuration {
    /// From an answer that may hold any of it.
    pub(super) fn of_answer(answer: &RawValue) -> Self {
        Self::of_text(answer.get())
    }

    /// Parts that are too large, or not of ACP's shape, are left out.
    pub(super) fn of_text(text: &str) -> Self {
        let told: Told = serde_json::from_str(text).unwrap_or_default();
        Self {
            modes: told.modes.and_then(bounded).filter(Value::is_object),
            models: told.models.and_then(bounded).filter(Value::is_object),
            config_options: told.config_options.and_then(options),
        }
    }

    pub(super) fn to_text(&self) -> Arc<str> {
        // Maps with string keys: always representable.
        serde_json::to_string(self).unwrap_or_default().into()
    }

    pub(super) fn config_options(&self) -> &[Value] {
        self.config_options.as_deref().unwrap_or_default()
    }

    /// What an update of the agent changes.
    pub(super) fn observe(&mut self, change: &Observed) {
        match change {
            Observed::Mode(mode) => {
                self.modes.get_or_insert_with(|| json!({}))["currentModeId"] = mode.clone();
            }
            Observed::Options(options) => self.config_options = Some(options.clone()),
        }
    }

    /// What the success of a request means, as far as its answer does not say.
    pub(super) fn granted(&mut self, method: &str, params: &Value, answer: &RawValue) {
        let told = Self::of_answer(answer);
        match method {
            SET_MODE if told.modes.is_none() => {
                if let (Some(modes), Some(mode)) = (&mut self.modes, params["modeId"].as_str()) {
                    modes["currentModeId"] = json!(mode);
                }
            }
            SET_MODEL if told.models.is_none() => {
                if let (Some(models), Some(model)) = (&mut self.models, params["modelId"].as_str())
                {
                    models["currentModelId"] = json!(model);
                }
            }
            SET_CONFIG_OPTION if told.config_options.is_none() => {
                if let Some(option) = self.option_mut(params["configId"].as_str()) {
                    option["currentValue"] = params["value"].clone();
                }
            }
            _ => {}
        }
    }

    /// What the answer to a request says.
    pub(super) fn told_by(&mut self, method: &str, answer: &RawValue) {
        if ![SET_MODE, SET_MODEL, SET_CONFIG_OPTION].contains(&method) {
            return;
        }
        let told = Self::of_answer(answer);
        self.modes = told.modes.or_else(|| self.modes.take());
        self.models = told.models.or_else(|| self.models.take());
        self.config_options = told.config_options.or_else(|| self.config_options.take());
    }

    /// The updates with which an agent would have told that it is no longer as it was in `before`.
    pub(super) fn untold_updates(&self, before: &Self) -> Vec<Value> {
        let mut updates = Vec::new();
        if let Some(mode) = self.current_mode()
            && before.current_mode() != Some(mode)
        {
            updates.push(json!({ "sessionUpdate": "current_mode_update", "currentModeId": mode }));
        }
        if let Some(options) = &self.config_options
            && before.config_options.as_ref() != Some(options)
        {
            updates
                .push(json!({ "sessionUpdate": "config_option_update", "configOptions": options }));
        }
        updates
    }

    /// ACP's state of the modes; of an agent that has them as an option, made of that.
    pub(super) fn offered_modes(&self) -> Option<Value> {
        if self.modes.is_some() {
            return self.modes.clone();
        }
        let options = self.config_options();
        let option = options.iter().find(|option| option["category"] == MODE)?;
        let available: Vec<_> = entries(option)
            .map(|entry| {
                let mut mode = json!({ "id": entry["value"], "name": entry["name"] });
                if !entry["description"].is_null() {
                    mode["description"] = entry["description"].clone();
                }
                mode
            })
            .collect();
        Some(json!({ "currentModeId": option["currentValue"], "availableModes": available }))
    }

    fn current_mode(&self) -> Option<&str> {
        self.modes.as_ref()?["currentModeId"].as_str()
    }

    fn current_model(&self) -> Option<&str> {
        self.models.as_ref()?["currentModelId"].as_str()
    }

    /// What has to be asked of an agent that is as `self` says, so that it is as `wanted` says. Only
    /// what it still offers.
    pub(super) fn towards(&self, wanted: &Self) -> Vec<Setting> {
        let mut settings = Vec::new();
        if let Some(model) = wanted.current_model()
            && self.current_model().is_some_and(|current| current != model)
        {
            settings.push(set_model(model));
        }
        if let Some(mode) = wanted.current_mode()
            && self.current_mode().is_some_and(|current| current != mode)
        {
            settings.push(set_mode(mode));
        }
        // The model first: it decides which values others have.
        let mut options: Vec<_> = wanted.config_options().iter().collect();
        options.sort_by_key(|option| option["category"] != MODEL);
        for option in options {
            let (id, value) = (&option["id"], &option["currentValue"]);
            let current = self.config_options().iter().find(|own| own["id"] == *id);
            if let (Some(current), Some(id)) = (current, id.as_str())
                && current["currentValue"] != *value
            {
                settings.push(set_option(id, value, current));
            }
        }
        settings
    }

    /// `setMode` of an agent that is as `self` says.
    pub(super) fn mode(&self, agent: &str, mode: &str) -> Result<Setting> {
        if let Some(modes) = &self.modes {
            require_offered("mode", mode, &ids(&modes["availableModes"], "id"))?;
            return Ok(set_mode(mode));
        }
        self.of_category(agent, MODE, "mode", mode)
    }

    pub(super) fn model(&self, agent: &str, model: &str) -> Result<Setting> {
        if let Some(models) = &self.models {
            require_offered("model", model, &ids(&models["availableModels"], "modelId"))?;
            return Ok(set_model(model));
        }
        self.of_category(agent, MODEL, "model", model)
    }

    pub(super) fn thought_level(&self, agent: &str, level: &str) -> Result<Setting> {
        self.of_category(agent, THOUGHT_LEVEL, "thoughtLevel", level)
    }

    pub(super) fn option(&self, agent: &str, id: &str, value: &Value) -> Result<Setting> {
        let options = self.config_options();
        if options.is_empty() {
            return Err(unsupported(agent, "configuration option"));
        }
        let known = options.iter().filter_map(|option| option["id"].as_str());
        require_offered("optionId", id, &known.collect::<Vec<_>>())?;
        let option = options.iter().find(|option| option["id"] == id);
        let option = option.unwrap_or(&Value::Null);
        if option["type"] == "boolean" {
            if !value.is_boolean() {
                let problem = format!("{id} is switched with true or false");
                return Err(Error::invalid_argument("value", problem));
            }
        } else {
            let Some(value) = value.as_str() else {
                let problem = format!("the values of {id} are strings");
                return Err(Error::invalid_argument("value", problem));
            };
            require_offered("value", value, &values(option))?;
        }
        Ok(set_option(id, value, option))
    }

    fn of_category(
        &self,
        agent: &str,
        category: &str,
        field: &'static str,
        value: &str,
    ) -> Result<Setting> {
        let options = self.config_options();
        // An agent that names no categories at all may still use the obvious ids.
        let option = options
            .iter()
            .find(|option| option["category"] == category)
            .or_else(|| options.iter().find(|option| option["id"] == category))
            .ok_or_else(|| unsupported(agent, &field.replace("thoughtLevel", "thought level")))?;
        require_offered(field, value, &values(option))?;
        let id = option["id"].as_str().unwrap_or_default();
        Ok(set_option(id, &json!(value), option))
    }

    fn option_mut(&mut self, id: Option<&str>) -> Option<&mut Value> {
        let options = self.config_options.as_mut()?;
        options
            .iter_mut()
            .find(|option| option["id"].as_str() == id)
    }
}

fn set_mode(mode: &str) -> Setting {
    Setting {
        method: SET_MODE,
        params: json!({ "modeId": mode }),
        what: format!("mode {mode}"),
    }
}

fn set_model(model: &str) -> Setting {
    Setting {
        method: SET_MODEL,
        params: json!({ "modelId": model }),
        what: format!("model {model}"),
    }
}

fn set_option(id: &str, value: &Value, option: &Value) -> Setting {
    let mut params = json!({ "configId": id, "value": value });
    if option["type"] == "boolean" {
        params["type"] = json!("boolean");
    }
    Setting {
        method: SET_CONFIG_OPTION,
        params,
        what: format!("{id} {value}"),
    }
}

/// What a select option can be, in groups or not.
fn entries(option: &Value) -> impl Iterator<Item = &Value> {
    let entries = option["options"].as_array().map_or(&[][..], Vec::as_slice);
    entries
        .iter()
        .flat_map(|entry| match entry["options"].as_array() {
            Some(group) => group.as_slice(),
            None => std::slice::from_ref(entry),
        })
}

fn values(option: &Value) -> Vec<&str> {
    entries(option)
        .filter_map(|entry| entry["value"].as_str())
        .collect()
}

fn ids<'a>(list: &'a Value, field: &str) -> Vec<&'a str> {
    let entries = list.as_array().map_or(&[][..], Vec::as_slice);
    entries
        .iter()
        .filter_map(|entry| entry[field].as_str())
        .collect()
}

/// A value that the agent does not list is refused here, with the list.
fn require_offered(field: &str, value: &str, offered: &[&str]) -> Result<()> {
    if offered.contains(&value) {
        return Ok(());
    }
    Err(Error::invalid_argument(
        field,
        format!(
            "{value:?} is not offered; the agent offers: {}",
            offered.join(", ")
        ),
    ))
}

fn unsupported(agent: &str, what: &str) -> Error {
    Error::new(
        Code::AgentUnsupported,
        format!(
            "{agent} has no {what} that a client can choose: see getModes() and getConfigOptions()"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(json: &Value) -> Configuration {
        Configuration::of_text(&json.to_string())
    }

    fn example() -> Configuration {
        configuration(&json!({
            "modes": { "currentModeId": "ask", "availableModes": [{ "id": "ask" }, { "id": "code" }] },
            "configOptions": [
                { "id": "effort", "category": "thought_level", "type": "select", "currentValue": "low",
                  "options": [{ "value": "low" }, { "value": "high" }] },
                { "id": "llm", "category": "model", "type": "select", "currentValue": "small",
                  "options": [{ "group": "g", "options": [{ "value": "small" }, { "value": "big" }] }] },
                { "id": "web", "type": "boolean", "currentValue": false },
            ],
        }))
    }

    #[test]
    fn modes_that_are_an_option_are_offered_as_modes() {
        let build = json!({ "value": "build", "name": "Build", "description": "Works" });
        let plan = json!({ "options": [{ "value": "plan", "name": "Plan" }] });
        let option = json!({
            "id": "m", "category": "mode", "type": "select", "currentValue": "plan",
            "options": [build, plan],
        });
        let configuration =
            Configuration::of_text(&json!({ "configOptions": [option] }).to_string());
        assert_eq!(
            configuration.offered_modes(),
            Some(json!({
                "currentModeId": "plan",
                "availableModes": [
                    { "id": "build", "name": "Build", "description": "Works" },
                    { "id": "plan", "name": "Plan" },
                ],
            }))
        );
    }

    #[test]
    fn each_call_finds_what_the_agent_offers_for_it() {
        let agent = example();
        let mode = agent.mode("test", "code").expect("offered");
        assert_eq!(
            (mode.method, mode.params),
            (SET_MODE, json!({ "modeId": "code" }))
        );
        let model = agent.model("test", "big").expect("offered");
        assert_eq!(model.params, json!({ "configId": "llm", "value": "big" }));
        let level = agent.thought_level("test", "high").expect("offered");
        assert_eq!(
            level.params,
            json!({ "configId": "effort", "value": "high" })
        );
        let web = agent.option("test", "web", &json!(true)).expect("offered");
        assert_eq!(
            web.params,
            json!({ "configId": "web", "value": true, "type": "boolean" })
        );
    }

    #[test]
    fn what_is_not_offered_is_answered_with_what_is() {
        let agent = example();
        for (result, named) in [
            (agent.mode("test", "fly"), "ask, code"),
            (agent.model("test", "huge"), "small, big"),
            (agent.option("test", "x", &json!("y")), "effort, llm, web"),
            (agent.option("test", "web", &json!("yes")), "true or false"),
        ] {
            let error = result.expect_err(named);
            assert_eq!(error.code, Code::InvalidArgument);
            assert!(error.message.contains(named), "{error}");
        }
        let nothing = Configuration::default();
        for result in [
            nothing.mode("test", "a"),
            nothing.option("test", "a", &json!(1)),
        ] {
            assert_eq!(result.expect_err("nothing").code, Code::AgentUnsupported);
        }
    }

    #[test]
    fn a_change_that_the_agent_told_needs_no_other_word() {
        let before = example();
        let mut now = before.clone();
        now.granted(SET_MODE, &json!({ "modeId": "code" }), RawValue::NULL);
        let untold = now.untold_updates(&before);
        assert_eq!(
            untold,
            [json!({ "sessionUpdate": "current_mode_update", "currentModeId": "code" })]
        );
        let mut told = before;
        told.observe(&Observed::Mode(json!("code")));
        assert_eq!(now.untold_updates(&told), Vec::<Value>::new());
    }

    #[test]
    fn a_resumed_agent_is_asked_for_what_differs_the_model_first() {
        let mut wanted = example();
        wanted.observe(&Observed::Mode(json!("code")));
        let high = json!({ "configId": "effort", "value": "high" });
        wanted.granted(SET_CONFIG_OPTION, &high, RawValue::NULL);
        let big = json!({ "configId": "llm", "value": "big" });
        wanted.granted(SET_CONFIG_OPTION, &big, RawValue::NULL);
        let asked: Vec<_> = example()
            .towards(&wanted)
            .into_iter()
            .map(|s| s.what)
            .collect();
        assert_eq!(asked, ["mode code", "llm \"big\"", "effort \"high\""]);
        assert_eq!(wanted.towards(&wanted), []);
    }

    #[test]
    fn what_is_of_another_shape_is_as_good_as_not_there() {
        let odd = json!({ "modes": "x", "models": [], "configOptions": ["x", { "id": "a" }, 1] });
        let mut odd = configuration(&odd);
        assert_eq!((&odd.modes, &odd.models), (&None, &None));
        assert_eq!(odd.config_options(), [json!({ "id": "a" })]);
        odd.observe(&Observed::Mode(json!("code")));
        for method in [SET_MODE, SET_MODEL, SET_CONFIG_OPTION] {
            let params = json!({ "modeId": "ask", "modelId": "m" });
            odd.granted(method, &params, RawValue::NULL);
        }
        assert_eq!(odd.current_mode(), Some("ask"));
    }

    #[test]
    fn what_is_too_large_is_not_kept_and_the_rest_is() {
        let huge = "x".repeat(MAX_BYTES);
        let large = json!({ "modes": { "currentModeId": "a" }, "configOptions": [{ "id": huge }] });
        let large = configuration(&large);
        assert_eq!(large.current_mode(), Some("a"));
        assert!(large.config_options().is_empty());
    }
}
