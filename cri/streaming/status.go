package streaming

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/utils/exec"
)

// status is how a session ended, as its error stream says it: a Status of Kubernetes' API, of which clients read these
// fields (since v4.channel.k8s.io).
type status struct {
	Status  string   `json:"status"`
	Message string   `json:"message,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	Details *details `json:"details,omitempty"`
	Code    int      `json:"code,omitempty"`
}

type details struct {
	Causes []cause `json:"causes"`
}

type cause struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// statusOf says how a session ended that returned err.
func statusOf(err error) status {
	var exit exec.CodeExitError
	switch {
	case err == nil:
		return status{Status: "Success"}
	case errors.As(err, &exit):
		return status{
			Status: "Failure", Reason: remotecommand.NonZeroExitCodeReason,
			Message: "command terminated with non-zero exit code: " + err.Error(),
			Details: &details{[]cause{{remotecommand.ExitCodeCauseType, strconv.Itoa(exit.Code)}}},
		}
	default:
		return status{Status: "Failure", Reason: "InternalError", Message: err.Error(), Code: http.StatusInternalServerError}
	}
}

// text is what goes to the error stream; older protocols than v4 say only what went wrong, and nothing on success.
func (s status) text(structured bool) []byte {
	if !structured {
		return []byte(s.Message)
	}
	data, err := json.Marshal(s)
	if err != nil { // strings and numbers: cannot be
		return nil
	}
	return data
}
