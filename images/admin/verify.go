package admin

import (
	"context"
	"net/http"

	"github.com/berth-run/berth/images"
)

// Verification is a request to verify the store.
type Verification struct {
	Deep   bool `json:"deep"`
	Repair bool `json:"repair"`
}

// verify verifies for as long as the client stays.
func (s *Server) verify(w http.ResponseWriter, r *http.Request) error {
	req, err := ask[Verification](w, r)
	if err != nil {
		return err
	}
	report, err := s.store.Verify(r.Context(), images.VerifyOptions{Deep: req.Deep, Repair: req.Repair})
	if err != nil {
		return err
	}
	reply(w, http.StatusOK, report)
	return nil
}

// Verify compares the store with what it should be, and mends it if asked to. What it finds is in the report.
func (c *Client) Verify(ctx context.Context, v Verification) (*images.Report, error) {
	return get[images.Report](ctx, c, http.MethodPost, "/v1/images/verify", v)
}
